"""This module holds the frames between the trainer and a worker, and the checks of what a user's class returned.

A frame is a header of 16 bytes (number of the job, kind, length) and a payload of ASCII JSON. The receiver reads the
header first, so that it can refuse a payload by its length and still knows whose it is. This module imports the
standard library alone and runs on Python 3.10: it is a part of the worker.
"""

from __future__ import annotations

import json
import math
import mmap
import numbers
import os
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

from fiberpo_megatron.environments import Outcome, Task, ToolCall, Trajectory, Turn

HEADER = struct.Struct("<QII")
READ_BYTES = 1 << 18
ERROR_BYTES = 1 << 20
"""Longest payload of a frame that reports a failure or describes the environment."""
LARGEST = (2 - 2**-23) * 2.0**127
"""The largest float32."""
TRACEBACK_CHARACTERS = 4000
TRACEBACK_SIGNAL = signal.SIGUSR2
"""On this signal a worker writes into its page where all of its threads stand."""
MESSAGE_CHARACTERS = 2000


class Kind(IntEnum):
    """Says what a frame carries."""

    # to the worker
    START = 1
    TASK = 2
    SCORE = 3
    GROUP = 4
    RUN = 5
    TURN = 6
    CANCEL = 7
    # from the worker
    READY = 8
    REFUSED = 9
    DONE = 10
    FAILED = 11
    SAY = 12


class InvalidReply(ValueError):
    """Is raised when a user's class returned something that its method must not return."""


def frame(kind: Kind, job: int, payload: bytes) -> bytes:
    """Return the bytes of one frame."""
    return HEADER.pack(job, kind, len(payload)) + payload


def encode(value: Any) -> bytes:
    """Return JSON in ASCII; lone surrogates survive, and numbers that are not finite are refused by ValueError."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


class FrameReader:
    """Cuts a stream of bytes into frames.

    check: called with (kind, job, length) as soon as a header is complete, before its payload is kept; what it raises
    leaves `feed`.
    """

    def __init__(self, check: Callable[[int, int, int], None] | None = None) -> None:
        self._check = check
        self._buffer = bytearray()
        self._header: tuple[int, int, int] | None = None

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Take bytes and yield every frame that is complete now, as (kind, job, payload)."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while True:
                if self._header is None:
                    if len(buffer) - start < HEADER.size:
                        return
                    job, kind, length = HEADER.unpack_from(buffer, start)
                    start += HEADER.size
                    if self._check is not None:
                        self._check(kind, job, length)
                    self._header = kind, job, length
                kind, job, length = self._header
                if len(buffer) - start < length:
                    return
                payload = bytes(buffer[start : start + length])
                start += length
                self._header = None
                yield kind, job, payload
        finally:
            del buffer[:start]


class Page:
    """Holds memory that a worker shares with the trainer: which job holds the worker's event loop, and since when.

    The trainer reads it at any time, also while code in C holds the worker's interpreter. Behind it in the same file
    stands the traceback that the worker writes on a signal (`TRACEBACK_AT`). Times are CLOCK_MONOTONIC in ns.
    """

    SIZE = 4096
    TRACEBACK_AT = SIZE
    _HOLD = struct.Struct("<QQQ")
    _JOB = struct.Struct("<Q")
    _BEAT_AT = 64

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, self.SIZE)

    @classmethod
    def create(cls) -> Page:
        """Make a new page of zeros; its file has no name and disappears with its last user."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("environment")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, cls.SIZE)
        return cls(descriptor)

    def hold(self, job: int, since: int, before: int) -> None:
        """Write that `job` holds the loop since `since`, after `before` ns of earlier work. Job 0 is no job."""
        self._JOB.pack_into(self._map, 0, 0)  # a reader between the writes sees no holder
        if job:
            self._HOLD.pack_into(self._map, 0, 0, since, before)
            self._JOB.pack_into(self._map, 0, job)

    def holder(self) -> tuple[int, int, int] | None:
        """Return (job, since, earlier work) of the holder, or None."""
        job, since, before = self._HOLD.unpack_from(self._map, 0)
        again = self._HOLD.unpack_from(self._map, 0)
        return (job, since, before) if job and again == (job, since, before) else None

    def beat(self, now: int) -> None:
        """Write that the event loop turned at `now`."""
        self._JOB.pack_into(self._map, self._BEAT_AT, now)

    def last_beat(self) -> int:
        """Return when the event loop turned last; 0 before it began."""
        return int(self._JOB.unpack_from(self._map, self._BEAT_AT)[0])

    def traceback(self) -> str:
        """Return what the worker wrote about where it stands."""
        data = os.pread(self.descriptor, TRACEBACK_CHARACTERS * 4, self.TRACEBACK_AT)
        return data.decode("utf-8", "replace")

    def close(self) -> None:
        """Release the memory and the file."""
        self._map.close()
        os.close(self.descriptor)


# ---- values in JSON ----


def scalar(value: Any) -> Any:
    """Return the Python number behind a scalar of NumPy or torch; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def plain(value: Any, where: str) -> Any:
    """Return `value` with lists for tuples and dicts for mappings. InvalidReply names the place of what JSON lacks."""
    value = scalar(value)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidReply(f"{where} is {value}; it must be finite")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidReply(f"{where} has the key {key!r}; names must be strings")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{position}]") for position, item in enumerate(value)]
    raise InvalidReply(
        f"{where} is a {type(value).__name__}, which JSON cannot represent; use numbers, strings, lists and dicts"
    )


def short(value: Any) -> str:
    """Return a text for messages: at most 120 characters of the value."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception as error:  # a class of somebody else's raises what it likes
        text = f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return text if len(text) <= 120 else f"{text[:120]}..."


def number(value: Any, where: str) -> float:
    """Return a finite float that is finite in 32 bits too, as the trainer keeps it. Scalars of NumPy and torch are
    taken. Raises InvalidReply otherwise."""
    value = scalar(value)
    if not isinstance(value, numbers.Real):
        raise InvalidReply(f"{where} is {short(value)} ({type(value).__name__}); it must be a number")
    try:
        result = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        result = math.inf
    if not math.isfinite(result):
        raise InvalidReply(f"{where} is {result}; it must be finite")
    if abs(result) > LARGEST:
        raise InvalidReply(f"{where} is {result}; it must be at most {LARGEST:.3g}, the largest number of 32 bits")
    return result


def named_numbers(value: Any, where: str) -> dict[str, float]:
    """Return a mapping from names to finite floats. Raises InvalidReply otherwise."""
    if not isinstance(value, Mapping):
        raise InvalidReply(f"{where} is {short(value)} ({type(value).__name__}); it must map names to numbers")
    for name in value:
        if not isinstance(name, str) or not name:
            raise InvalidReply(f"{where} has the name {short(name)}; names must be strings that are not empty")
    return {name: number(item, f"{where}[{name!r}]") for name, item in value.items()}


def checked_outcome(value: Any, method: str, *, bare: bool) -> Outcome:
    """Return an Outcome of plain finite numbers. `bare`: a number alone is taken as the reward.

    Raises InvalidReply that names the method and what is wrong.
    """
    if bare and not isinstance(value, Outcome):
        try:
            return Outcome(number(value, f"the result of {method}"))
        except InvalidReply as error:
            raise InvalidReply(f"{error} or an Outcome" if "must be a number" in str(error) else str(error)) from None
    if not isinstance(value, Outcome):
        raise InvalidReply(f"{method} returned {short(value)} ({type(value).__name__}); return an Outcome")
    correct = scalar(value.correct)
    if correct is not None and not isinstance(correct, bool):
        raise InvalidReply(f"`correct` of {method} is {short(correct)}; it must be True, False or None")
    if value.answer is not None and not isinstance(value.answer, str):
        raise InvalidReply(f"`answer` of {method} is {short(value.answer)}; it must be a string or None")
    return Outcome(
        number(value.reward, f"`reward` of {method}"),
        named_numbers(value.rewards, f"`rewards` of {method}"),
        correct,
        named_numbers(value.metrics, f"`metrics` of {method}"),
        value.answer,
    )


def checked_messages(value: Any, where: str) -> str | list[dict[str, Any]]:
    """Return a text that is not empty, or a list of chat messages; one message stands for a list of it."""
    if isinstance(value, str) and value:
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, Sequence) or not messages or isinstance(messages, (str, bytes)):
        raise InvalidReply(f"{where} must be a text that is not empty or a list of chat messages, got {short(value)}")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidReply(f"{where}[{position}] must be a chat message with a string `role`, got {short(message)}")
    checked: list[dict[str, Any]] = plain(list(messages), where)
    return checked


def checked_task(value: Any, method: str) -> Task:
    """Return a Task that survives JSON. Raises InvalidReply that names the method and what is wrong."""
    if not isinstance(value, Task):
        raise InvalidReply(f"{method} returned {short(value)} ({type(value).__name__}); return a Task")
    prompt = checked_messages(value.prompt, f"`prompt` of {method}")
    if isinstance(prompt, str) and not prompt.strip():
        raise InvalidReply(f"`prompt` of {method} holds white space only")
    if not isinstance(value.metadata, Mapping):
        raise InvalidReply(f"`metadata` of {method} must be a dict, got {short(value.metadata)}")
    if value.id is not None and (not isinstance(value.id, str) or not value.id):
        raise InvalidReply(f"`id` of {method} must be a string that is not empty or None, got {short(value.id)}")
    answer = plain(value.answer, f"`answer` of {method}")
    return Task(prompt, answer, plain(value.metadata, f"`metadata` of {method}"), value.id)


# ---- the dataclasses as JSON ----


def task_to_json(task: Task) -> dict[str, Any]:
    """Return the fields of a task."""
    prompt = task.prompt if isinstance(task.prompt, str) else [dict(message) for message in task.prompt]
    return {"prompt": prompt, "answer": task.answer, "metadata": dict(task.metadata), "id": task.id}


def turn_to_json(turn: Turn) -> dict[str, Any]:
    """Return the fields of a turn."""
    calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in turn.tool_calls]
    return {
        "text": turn.text,
        "finish_reason": turn.finish_reason,
        "token_ids": list(turn.token_ids),
        "tool_calls": calls,
        "prompt_tokens": turn.prompt_tokens,
    }


def turn_from_json(fields: Mapping[str, Any]) -> Turn:
    """Return the turn with these fields."""
    calls = tuple(ToolCall(**call) for call in fields["tool_calls"])
    return Turn(fields["text"], fields["finish_reason"], tuple(fields["token_ids"]), calls, fields["prompt_tokens"])


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Return the fields of an outcome."""
    return {
        "reward": outcome.reward,
        "rewards": dict(outcome.rewards),
        "correct": outcome.correct,
        "metrics": dict(outcome.metrics),
        "answer": outcome.answer,
    }


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """Return the fields of a trajectory."""
    return {"turns": list(map(turn_to_json, trajectory.turns)), "outcome": outcome_to_json(trajectory.outcome)}


def trajectory_from_json(fields: Mapping[str, Any]) -> Trajectory:
    """Return the trajectory with these fields."""
    return Trajectory(tuple(map(turn_from_json, fields["turns"])), Outcome(**fields["outcome"]))
