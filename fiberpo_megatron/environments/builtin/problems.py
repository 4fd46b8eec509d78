"""This module turns a row of a data set into a problem, and says what is wrong with a row that is none.

It imports the standard library alone, because it runs in the workers of environments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from fiberpo_megatron.environments.builtin.final_answers import last_number
from fiberpo_megatron.printable import printable


class Problem(NamedTuple):
    """Holds one problem of a data set."""

    row: int
    """Its position among the rows of the data set, counted from 0 before anything is filtered."""
    prompt: str | tuple[dict[str, str], ...]
    """A text, or chat messages."""
    answer: Any
    """The right answer; a text where the environment compares texts."""
    id: str | None
    """Its name in the data set; None if the rows have no names."""
    metadata: dict[str, Any]
    source: str
    """File and line (or row, from 0), for messages."""
    difficulty: float | None = None
    """The number by which problems are ordered; None if the data set has no field for it."""

    def digest(self) -> bytes:
        """Return 8 bytes that tell prompts apart."""
        return blake2b(json.dumps(self.prompt).encode(), digest_size=8).digest()

    def characters(self) -> int:
        """Return the length of the prompt, of all its messages together."""
        if isinstance(self.prompt, str):
            return len(self.prompt)
        return sum(len(message["content"]) for message in self.prompt)


@dataclass(frozen=True)
class Fields:
    """Says in which fields of a row a problem stands.

    A name with dots, such as "reward_model.ground_truth", is looked up inside of tables where no field has it.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    id: str | None = None
    metadata: tuple[str, ...] = ()
    difficulty: str | None = None
    """A field that must hold a number."""
    text_answers: bool = True
    """Whether an answer must be a text or a number. Otherwise it may be anything, and may be missing."""
    numeric_answers: bool = False
    """Whether there must be a number in an answer."""
    answer_after: str | None = None
    """The answer is what follows the last occurrence of this text in its field, where there is one."""

    @property
    def names(self) -> list[str]:
        """Return the names of the fields that are read."""
        return [self.prompt, self.answer, *filter(None, (self.id, self.difficulty)), *self.metadata]

    @property
    def optional(self) -> list[str]:
        """Return the names of fields that may be missing."""
        return [] if self.text_answers else [self.answer]

    def problem(self, record: object, row: int, source: str) -> Problem:
        """Return the problem in a row. Raises ValueError that names the source, the field, the value and the fix."""
        if not isinstance(record, dict):
            raise ValueError(
                f"{source}: expected a JSON object with `{self.prompt}` and `{self.answer}`, got {short(record)}"
            )
        prompt = _prompt(looked_up(record, self.prompt), self.prompt, source)
        name = None if self.id is None else _id(looked_up(record, self.id), self.id, source)
        facts = {field: _fact(looked_up(record, field), field, source) for field in self.metadata}
        return Problem(row, prompt, self._answer(record, source), name, facts, source, self._difficulty(record, source))

    def _difficulty(self, record: Mapping[str, Any], source: str) -> float | None:
        if self.difficulty is None:
            return None
        value = looked_up(record, self.difficulty)
        number = number_in(value)
        if number is None:
            raise ValueError(f"{source}: `{self.difficulty}` must be a finite number, got {short(value)}")
        return number

    def _answer(self, record: Mapping[str, Any], source: str) -> Any:
        answer = looked_up(record, self.answer)
        if not self.text_answers:
            return _fact(answer, self.answer, source)
        if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
            return str(answer)
        if isinstance(answer, str) and self.answer_after is not None:
            answer = answer.rpartition(self.answer_after)[2].strip()
        if isinstance(answer, str) and self.numeric_answers and last_number(answer) is None:
            raise ValueError(f"{source}: `{self.answer}` must hold a number, got {short(answer)}")
        if isinstance(answer, str) and answer.strip():
            return _whole_text(answer, self.answer, source)
        raise ValueError(f"{source}: `{self.answer}` must be a non-empty string or a number, got {short(answer)}")


def looked_up(record: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; None if it is missing."""
    if name in record or "." not in name:
        return record.get(name)
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def parsed_line(line: bytes, source: str) -> object:
    """Return the JSON value of a line. Raises ValueError that names the source."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of brackets
        raise ValueError(f"{source}: not a JSON object ({error}): {short(line.decode())}") from None


def short(value: object) -> str:
    """Return at most 120 characters of a value, safe to print."""
    text = value if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= 120 else f"{text[:120]}...")


def _prompt(prompt: object, field: str, source: str) -> str | tuple[dict[str, str], ...]:
    if isinstance(prompt, str) and prompt.strip():
        return _whole_text(prompt, field, source)
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return tuple(
            {key: _whole_text(message[key], f"{field}[{number}].{key}", source) for key in ("role", "content")}
            for number, message in enumerate(prompt)
        )
    raise ValueError(
        f"{source}: `{field}` must be a non-empty string or a list of chat messages with string `role` and "
        f"`content`, got {short(prompt)}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _id(value: object, field: str, source: str) -> str:
    if isinstance(value, str) and value.strip():
        return _whole_text(value, field, source)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{source}: `{field}` must be a non-empty string or a whole number, got {short(value)}")


def _fact(value: Any, field: str, source: str) -> Any:
    """Return a value that JSON can hold."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _fact(inner, f"{field}.{key}", source) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fact(inner, f"{field}[{number}]", source) for number, inner in enumerate(value)]
    raise ValueError(
        f"{source}: `{field}` is {short(value)} ({type(value).__name__}), which JSON cannot represent; leave the field "
        "out, or write it as a text or a finite number"
    )


def _whole_text(text: str, field: str, source: str) -> str:
    """Return the text. Raises ValueError for half a character, which JSON can express and no encoding can."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: `{field}` holds the lone surrogate {text[error.start]!a} at character {error.start}, half of a "
            f"character that was cut; write the whole character, or leave it out: {short(text)}"
        ) from None
    return text


def number_in(value: object) -> float | None:
    """Return a finite number, also one that is written as a text; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
