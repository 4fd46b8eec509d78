"""This module makes text from models, engines and other programs safe to print."""

import unicodedata

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
