"""JSON of which nobody knows who wrote it: one clear error, whatever is in it."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron import json_files
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.printable import printable


def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content: dict[str, Any] = {"a": [1, 2.5, True, None], "ü": {"b": "\u2028"}, "big": 2**70}
    path.write_text(json.dumps(content, ensure_ascii=False))
    assert read_object(path) == content


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b"hello", "Expecting value"),
        (b"[1]", "a value of type list"),
        (b"null", "a value of type NoneType"),
        (b'{"a": 1}{', "Extra data"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands in one object twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"\x1b[2J\x1b]": 1, "\x1b[2J\x1b]": 2}', "Invalid control character"),
        (b'{"\\u001b[2J": 1, "\\u001b[2J": 2}', r"the key '\x1b[2J' stands"),
    ],
)
def test_what_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_object(path)
    assert said in str(caught.value) and str(caught.value).startswith(f"{path} cannot be read as JSON: ")
    assert printable(str(caught.value)) == str(caught.value) and len(str(caught.value)) < 600


def test_numbers_that_are_not_finite_where_they_may_be(tmp_path: Path) -> None:
    """A metric in a checkpoint's description."""
    (tmp_path / "a").write_text('{"a": NaN, "b": -Infinity, "c": 1e999}')
    read = read_object(tmp_path / "a", finite=False)
    assert read["a"] != read["a"] and read["b"] == -read["c"] == -float("inf")


def test_files_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_object(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        read_object(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "nothing")


def test_a_file_without_end(tmp_path: Path) -> None:
    """A terabyte that takes no room on the disk."""
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", 2**40)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"at most {json_files.LIMIT_BYTES} are read"):
        read_object(tmp_path / "big")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80) | st.text(alphabet='{}[]",:0123456789eE+-.naIty\\u ', max_size=40).map(str.encode))
def test_any_bytes_are_an_object_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_object(path), dict)
    except ValueError as error:
        assert str(error).startswith(str(path)) and printable(str(error)) == str(error)
