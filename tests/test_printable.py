"""Text that is shown to people never steers their terminal."""

import sys

import pytest

from fiberpo_megatron.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 100 %", "plain text, 100 %"),
        ("Größe 漢字 🙂", "Größe 漢字 🙂"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("a\x85b\u2028c\u2029d", r"a\x85b\u2028c\u2029d"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("half \ud83d", r"half \ud83d"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown


def test_every_character_can_be_encoded_and_stays_on_its_line():
    shown = printable("".join(map(chr, range(sys.maxunicode + 1))))
    assert len(shown.splitlines()) == 1 and "\x1b" not in shown
    shown.encode("utf-8")


def test_some_characters_can_be_kept():
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
