"""This module finds the program in an answer, and compares what a program did with what was expected of it.

Comparison follows the graders of APPS and LiveCodeBench: white space at the ends of lines and blank lines at the end do
not count, and numbers are compared as numbers. It runs in the worker, so that right answers never enter a sandbox.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from typing import Any

FENCE = "```"
NUMBER_CHARACTERS = 400
"""A longer word is compared as text alone."""
NEITHER_INTEGER = frozenset(".eE")


def last_program(text: str, languages: Collection[str], *, needs_fence: bool) -> str | None:
    """Return the last fenced block of an answer whose info string is one of `languages`; None without one.

    needs_fence: whether an answer that has no fence is no program. Otherwise it is one as a whole.
    """
    found: str | None = None
    block: list[str] | None = None
    fenced = takes = False
    for line in text.split("\n"):
        stripped = line.strip()
        if not stripped.startswith(FENCE):
            if block is not None:
                block.append(line)
            continue
        fenced = True
        if block is None:
            info = stripped[len(FENCE) :].strip().lower()
            block, takes = [], info in languages
        elif stripped == FENCE:
            if takes:
                found = "\n".join(block)
            block = None
        else:
            block.append(line)
    return text if found is None and not fenced and not needs_fence else found


def same_output(expected: str, got: str, tolerance: float) -> bool:
    """Return whether two texts on stdout are the same output."""
    lines, others = _lines(expected), _lines(got)
    return len(lines) == len(others) and all(
        line == other or _same_words(line.split(), other.split(), tolerance) for line, other in zip(lines, others)
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_words(words: list[str], others: list[str], tolerance: float) -> bool:
    return len(words) == len(others) and all(
        word == other or _same_numbers(word, other, tolerance) for word, other in zip(words, others)
    )


def _same_numbers(word: str, other: str, tolerance: float) -> bool:
    """Return whether two words are the same number: exactly where the expected one is whole, else within tolerance."""
    if max(len(word), len(other)) > NUMBER_CHARACTERS:
        return False
    try:
        number, second = Decimal(word), Decimal(other)
    except InvalidOperation:
        return False
    if not number.is_finite() or not second.is_finite():
        return False
    return number == second or (bool(NEITHER_INTEGER & set(word)) and _close(float(number), float(second), tolerance))


def same_value(expected: Any, got: str, tolerance: float) -> bool:
    """Return whether JSON text of a returned value stands for the expected value.

    APPS wraps expected values into a list of one; a value that equals its only element is right as well.
    """
    try:
        value = json.loads(got)
        return _equal(expected, value, tolerance) or (
            isinstance(expected, list) and len(expected) == 1 and _equal(expected[0], value, tolerance)
        )
    except (ValueError, RecursionError):
        return False


def _equal(expected: Any, got: Any, tolerance: float) -> bool:
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(_equal(a, b, tolerance) for a, b in zip(expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(_equal(expected[key], got[key], tolerance) for key in expected)
    if isinstance(expected, float) and isinstance(got, (int, float)) and not isinstance(got, bool):
        return _close(expected, got, tolerance)
    return bool(expected == got)


def _close(expected: float, got: float, tolerance: float) -> bool:
    try:
        return math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # a whole number beyond all floats
        return False
