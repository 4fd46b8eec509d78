"""This module finds the final answer in the text of a response: its last box, or its last number."""

from __future__ import annotations

import re
from decimal import Decimal

LAST_CHARACTERS = 10_000
"""Numbers are looked for in the end of a text only, since the final answer stands there."""
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])-)?(?<![0-9.])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
)


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}`, with its braces balanced; None if there is none."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin += len("\\boxed{")
    depth = 1
    for place in range(begin, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[begin:place]
    return None


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text: `1,000`, `-0.5` and `2e3` are one each; None if there is none.

    Numbers are compared exactly: 0.50 equals 0.5, and of a fraction 1/2 the last number is 2.
    """
    found = _NUMBER.findall(text[-LAST_CHARACTERS:].replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None
