"""This module reads the unit tests of a programming problem from the fields of its data set.

It knows the layouts of APPS and of LiveCodeBench and one of its own, and imports the standard library alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.environments.builtin.problems import short

DECODED_BYTES = 1 << 28
"""The longest tests that a compressed field may hold."""
PICKLE_MARK = b"\x80"


@dataclass(frozen=True)
class UnitTest:
    """Holds one input and what is expected of it."""

    expected: Any
    """The text on stdout, or the value that the function returns."""
    stdin: str = ""
    arguments: tuple[Any, ...] | None = None
    """The arguments of the function; None for a program that reads stdin."""


@dataclass(frozen=True)
class UnitTests:
    """Holds all tests of one problem."""

    fn_name: str | None
    """The function that is called; None for a program that reads stdin and writes stdout."""
    tests: tuple[UnitTest, ...]


@dataclass(frozen=True)
class Layout:
    """Says in which fields a data set holds a problem and its tests."""

    prompt: str
    fields: tuple[str, ...]
    """The fields of the tests."""
    starter_code: str | None = None


LAYOUTS: Mapping[str, Layout] = {
    "tests": Layout("prompt", ("tests", "fn_name")),
    "apps": Layout("question", ("input_output",), "starter_code"),
    "livecodebench": Layout(
        "question_content", ("public_test_cases", "private_test_cases", "metadata"), "starter_code"
    ),
}
"""The layouts of data sets by name."""


def unit_tests(layout: str, fields: Mapping[str, Any], source: str) -> UnitTests:
    """Return the tests of a problem. `fields`: the fields of the layout. `source`: file and line, for errors.

    Raises ValueError that names the source, the field, the value and the fix.
    """
    read = {"tests": _own, "apps": _apps, "livecodebench": _livecodebench}[layout]
    found = read(fields, source)
    if not found.tests:
        raise ValueError(f"{source}: `{LAYOUTS[layout].fields[0]}` holds no test; leave the problem out")
    return found


def _own(fields: Mapping[str, Any], source: str) -> UnitTests:
    """Read `tests`, a list of objects with `input` and `output`, and `fn_name`."""
    fn_name = _function(fields["fn_name"], "fn_name", source)
    cases = _decoded(fields["tests"], "tests", source)
    return UnitTests(fn_name, _cases(cases, "tests", fn_name, source, encoded=False))


def _apps(fields: Mapping[str, Any], source: str) -> UnitTests:
    """Read `input_output`, an object with the lists `inputs` and `outputs`, and perhaps `fn_name`."""
    value = _decoded(fields["input_output"], "input_output", source)
    inputs, outputs = (value.get(name) if isinstance(value, dict) else None for name in ("inputs", "outputs"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError(
            f"{source}: `input_output` must hold the lists `inputs` and `outputs` of the same length, got "
            f"{short(value)}"
        )
    fn_name = _function(value.get("fn_name"), "input_output.fn_name", source)
    cases = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs)]
    return UnitTests(fn_name, _cases(cases, "input_output", fn_name, source, encoded=False))


def _livecodebench(fields: Mapping[str, Any], source: str) -> UnitTests:
    """Read the public and the private test cases, and the function's name from `metadata`."""
    metadata = _decoded(fields["metadata"] or "{}", "metadata", source)
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    fn_name = _function(name, "metadata.func_name", source)
    tests: list[UnitTest] = []
    for field in ("public_test_cases", "private_test_cases"):
        if fields[field]:
            cases = _decoded(fields[field], field, source)
            tests += _cases(cases, field, fn_name, source, encoded=True)
    return UnitTests(fn_name, tuple(tests))


def _decoded(value: Any, field: str, source: str) -> Any:
    """Return the value of a field that may be written as JSON, or as JSON that was compressed and put into base64."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    try:
        packed = base64.b64decode(value, validate=True)
        stream = zlib.decompressobj()
        data = stream.decompress(packed, DECODED_BYTES)
        if not stream.eof and not stream.unconsumed_tail:
            raise ValueError("it is cut off")
    except (binascii.Error, ValueError, zlib.error):
        raise ValueError(f"{source}: `{field}` is not JSON ({reason}), got {short(value)}") from None
    if stream.unconsumed_tail:
        raise ValueError(f"{source}: `{field}` holds more than {DECODED_BYTES >> 20} MiB when it is decompressed")
    if data.startswith(PICKLE_MARK):
        raise ValueError(
            f"{source}: `{field}` is pickled, and reading a pickle would run whatever it says; convert the data set "
            "once, where you trust it: base64.b64encode(zlib.compress(json.dumps(cases).encode())), or the list of "
            "cases as plain JSON"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: `{field}` is not JSON after decompression ({error})") from None


def _function(value: Any, field: str, source: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.isidentifier():
        return value
    raise ValueError(f"{source}: `{field}` must be the name of a function, got {short(value)}")


def _cases(cases: Any, field: str, fn_name: str | None, source: str, *, encoded: bool) -> tuple[UnitTest, ...]:
    """Return the tests in a list of objects with `input` and `output`.

    encoded: arguments and results of a function are JSON texts, one argument a line, as in LiveCodeBench.
    """
    if not isinstance(cases, list):
        raise ValueError(f"{source}: `{field}` must be a list of tests, got {short(cases)}")
    found = []
    for number, case in enumerate(cases):
        place = f"{source}: `{field}[{number}]`"
        if not isinstance(case, dict) or "input" not in case or "output" not in case:
            raise ValueError(f"{place} must be an object with `input` and `output`, got {short(case)}")
        given, expected = case["input"], case["output"]
        if fn_name is None:
            found.append(UnitTest(_text(expected, place, "output"), stdin=_text(given, place, "input")))
            continue
        if encoded:
            given, expected = _arguments(given, place), _json(expected, place, "output")
        if not isinstance(given, list):
            raise ValueError(f"{place}: `input` must be the list of the arguments of {fn_name}, got {short(given)}")
        found.append(UnitTest(expected, arguments=tuple(given)))
    return tuple(found)


def _text(value: Any, place: str, name: str) -> str:
    """Return a text, or the lines of a list of texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise ValueError(f"{place}: `{name}` must be a text or a list of lines, got {short(value)}")


def _arguments(value: Any, place: str) -> list[Any]:
    if not isinstance(value, str):
        raise ValueError(f"{place}: `input` must be a text with one JSON value a line, got {short(value)}")
    return [_json(line, place, "input") for line in value.split("\n") if line.strip()]


def _json(text: Any, place: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: `{name}` must be JSON ({error}), got {short(text)}") from None
