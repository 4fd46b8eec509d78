"""Text that is shown to people never steers their terminal."""

import json
import sys

import pytest

from fiberpo_megatron.printable import json_line, printable, tail


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


def test_a_json_line_shows_letters_and_escapes_what_is_hidden():
    value = {"Größe": '漢字 🙂 \x1b[2J \x7f\x85\u2028\u2029\u202e\ud83d\U000e0041\x00 "\n\\', "n": [1, None, 0.5]}
    line = json_line(value)
    assert json.loads(line) == value
    assert "漢字 🙂" in line and r"\u2028" in line and r"\ud83d" in line and r"\udb40\udc41" in line


def test_every_character_of_a_json_line_is_read_again():
    planes = (range(0x20000), range(0xE0000, 0xE0200), (sys.maxunicode,))  # all that have more than ideographs
    everything = "".join(chr(number) for plane in planes for number in plane)
    line = json_line(everything)
    assert len(line.splitlines()) == 1 and printable(line) == line
    read = json.loads(line.encode("utf-8"))  # the last high surrogate and the first low one, side by side, make one
    assert read == everything.replace("\udbff\udc00", "\U0010fc00")


def test_the_tail_of_a_log(tmp_path):
    log = tmp_path / "a.log"
    log.write_bytes(b"1\n2\r\n\x1b[31m3\x1b[0m\xff\r 50 %\r100 %\n\xe2\x80\xa8end\n\n")
    assert tail(log, 4) == [r"\x1b[31m3\x1b[0m\ufffd".replace(r"\ufffd", "\ufffd"), " 50 %", "100 %", r"\u2028end"]
    assert tail(log, 100)[:2] == ["1", "2"]
    log.write_bytes(b"")
    assert tail(log, 4) == []
    log.write_bytes(b"x" * 10**6 + b"\nlast")
    assert len("".join(tail(log, 3))) < 600 and tail(log, 3)[-1] == "last"
    with pytest.raises(OSError, match="No such file"):
        tail(tmp_path / "none", 4)
