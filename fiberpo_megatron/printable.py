"""This module makes text from models, engines and other programs safe to print, and to write as JSON lines."""

import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that a terminal or a browser obeys or hides: control characters (ESC), format characters (those
that reverse the direction of text, zero-width ones), surrogates, unassigned ones and line separators."""


def printable(text: str, *, keep: str = "") -> str:
    r"""Return `text` with every character that is not shown as itself written as an escape (`\x1b`, `\u2028`, `\n`).

    `keep` names characters that stay, for example a line feed and a tab. Backslashes stay single: the result is for
    reading, not for parsing.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if character in keep or unicodedata.category(character) not in _HIDDEN else ascii(character)[1:-1]
        for character in text
    )


_NOT_PLAIN = re.compile(r"[^ -~]")
TAIL_BYTES = 200
"""Bytes of a log that `tail` reads for each line."""


def json_line(value: Any) -> str:
    r"""Return `value` as JSON on one line, for a file that people read too: `json.loads` gives the same value again.

    Letters of all scripts stand as themselves. Whatever `printable` would escape is written as JSON's `\u1b2c`, so that
    no character ends the line or steers a terminal, and lone surrogates can be encoded as UTF-8. (A high surrogate that
    stands before a low one is read back as the character that the two make.) Raises TypeError for what JSON lacks.
    """
    return _NOT_PLAIN.sub(_escaped, json.dumps(value, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return json.dumps(character)[1:-1] if unicodedata.category(character) in _HIDDEN else character


def tail(log: Path, lines: int) -> list[str]:
    """Return the last lines of a log, at most `lines`, each safe to print. A long line is cut at its beginning, because
    at most TAIL_BYTES times `lines` bytes are read. Raises OSError."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - TAIL_BYTES * lines))
        text = file.read(TAIL_BYTES * lines).decode(errors="replace")
    ended = re.split(r"\r\n|[\r\n]", text.rstrip("\r\n"))
    return [printable(line, keep="\t") for line in ended[-lines:]] if text else []
