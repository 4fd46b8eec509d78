"""This module reads JSON files of which it is not certain who wrote them: those of a model folder or a checkpoint."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from fiberpo_megatron.printable import printable

LIMIT_BYTES = 256 * 2**20
"""Larger files are refused. The index of the largest published models has about 10 MB."""


def read_object(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises OSError for a file that cannot be opened, and ValueError, naming the file, for everything that is not one
    JSON object that all readers understand alike: other bytes than UTF-8, a key that stands in an object twice, nesting
    too deep to be read, a number with thousands of digits, a file above LIMIT_BYTES or no regular file. NaN and
    infinite numbers are refused as well if `finite`.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError("it is not a regular file")
            if facts.st_size > LIMIT_BYTES:
                raise ValueError(f"it has {facts.st_size} bytes, at most {LIMIT_BYTES} are read")
            text = file.read(LIMIT_BYTES + 1).decode("utf-8")
        found = json.loads(
            text,
            object_pairs_hook=_without_repetition,
            parse_float=_finite if finite else float,
            parse_constant=_finite if finite else float,
        )
        if not isinstance(found, dict):
            raise ValueError(f"it holds a value of type {type(found).__name__}, an object {{...}} is needed")
        return found
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as JSON: its values are nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {printable(str(error))}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe, at which an ordinary call would wait for ever, is opened without waiting."""
    return os.open(path, flags | os.O_NONBLOCK)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:100]!r} stands in one object twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value
