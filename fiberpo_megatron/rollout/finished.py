"""This module keeps what has ended of a step that is still being generated, in append-only files: one for each rank
and start of the run.

<folder>/rank_00003.0     where it comes from (an Origin), then a record for each segment and each group that has ended
<folder>/rank_00003.1     of the next start

A record is a head and its bytes. It reaches the kernel as a whole before anything else is taken, so that a killed
process loses none, and the disk within `SYNC_S`, so that a lost machine loses no older one; where the disk refuses, a
warning says so. A record that was cut short has another length or checksum than its head says, and the file ends before
it.
"""

import asyncio
import io
import json
import logging
import os
import struct
import threading
import zlib
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fiberpo_megatron import durable
from fiberpo_megatron.closeable import Closeable
from fiberpo_megatron.printable import printable
from fiberpo_megatron.rollout.dump import Origin
from fiberpo_megatron.rollout.segment_records import HEAD_BYTES, Place, decode, encode, place_of, response_key
from fiberpo_megatron.types import Branch, Completion, Prompt, RolloutGroup, TokenSequence, Trajectory, WeightSpan

_HEAD = struct.Struct("<4sqQI")
"""Magic, index of the prompt (_ORIGIN for the first record), bytes that follow, their CRC-32."""
_MAGIC = b"grp1"
_ORIGIN, _SEGMENT = -1, -2
SYNC_S = 1.0
"""Seconds within which a record is on the disk."""
_ARRAYS = (
    "token_ids",
    "log_probs",
    "routed_experts",
    "loss_mask",
    "engines",
    "teacher_log_probs",
    "reference_log_probs",
)
_FACTS = tuple(fact.name for fact in fields(Trajectory) if fact.name not in ("prompt", "completion", "branches"))
"""What a trajectory says besides its tokens: JSON values."""
_log = logging.getLogger(__name__)


class _Record(NamedTuple):
    prompt: int
    begin: int
    size: int
    crc32: int


class FinishedGroups(UserDict[int, RolloutGroup], Closeable):
    """These are the finished groups of one step by index of their prompt; what is set is appended to this rank's file.
    It implements `Segments` as well, with the segments of groups that have not ended.

    `mine`: indices to read. `usable`: whether groups of that origin may stand beside those that `origin` describes.
    A damaged file is used up to the damage. Close it when the step's groups are complete (`with`), in any thread,
    whatever another one writes at that moment.
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        rank: int,
        prompts: Sequence[Prompt],
        mine: Sequence[int],
        usable: Callable[[Origin], bool],
    ) -> None:
        super().__init__()
        self._folder, self._origin, self._rank = folder, origin, rank
        self._writing, self._closed = threading.Lock(), False
        self._file: IO[bytes] | None = None
        self._dirty: asyncio.TimerHandle | None = None
        self._segments: dict[bytes, dict[int, tuple[Path, _Record]]] = {}
        """Where the segments of each response are that earlier starts left, by the tokens before them."""
        self.left: set[int] = set()
        """Indices of all usable groups that earlier starts left, whichever rank they are for."""
        for file in _files(folder):
            records = _records(file)
            found = _origin(file, next(records, None))
            if found is None or not usable(found):
                _log.warning("%s is not used: it is of another configuration or other weights", file.name)
                continue
            for record in records:
                if record.prompt == _SEGMENT:
                    self._note(file, record)
                    continue
                self.left.add(record.prompt)
                group = _group(file, record, prompts[record.prompt]) if record.prompt in mine else None
                if group is not None:
                    self.data[record.prompt] = group

    def __setitem__(self, index: int, group: RolloutGroup) -> None:
        """Raises OSError naming the file and the fix when it cannot be written."""
        self._keep(index, _encode(group))
        super().__setitem__(index, group)

    def earlier(self, prompt: Sequence[int], seed: int) -> list[Completion]:
        """Return the segments of a response that earlier starts left, without a gap from its beginning on."""
        places = self._segments.get(response_key(prompt, seed), {})
        found: list[Completion] = []
        begin = 0
        while begin in places:
            segment = _segment(*places.pop(begin))
            if segment is None or not segment.token_ids:
                break
            found.append(segment)
            begin += len(segment.token_ids)
        return found

    def ended(self, prompt: Sequence[int], seed: int, begin: int, segment: Completion) -> None:
        """Keep a segment; see `Segments`. Raises OSError like `__setitem__`."""
        self._keep(_SEGMENT, encode(Place(response_key(prompt, seed), begin), segment))

    def _note(self, file: IO[bytes], record: _Record) -> None:
        file.seek(record.begin)
        head = file.read(min(record.size, HEAD_BYTES))
        if len(head) == HEAD_BYTES:
            place = place_of(head)
            self._segments.setdefault(place.key, {})[place.begin] = Path(file.name), record

    def _keep(self, kind: int, payload: bytes) -> None:
        with self._writing:
            if self._closed:  # a request that was no longer wanted has ended all the same
                return
            try:
                if self._file is None:
                    self._file = self._new_file()
                    self._append(_ORIGIN, json.dumps(asdict(self._origin)).encode())
                self._append(kind, payload)
                self._sync_soon()
            except OSError as error:
                file, self._file = self._file, None
                if file is not None:
                    _end(file, file.name)
                raise OSError(
                    error.errno,
                    f"keeping a finished rollout for a resume failed ({error.strerror}); make room, or set "
                    "storage.unfinished = false",
                    str(self._folder),
                ) from error

    def _sync_soon(self) -> None:
        """Have what was written on the disk within `SYNC_S`; where no event loop runs, when the file is closed."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._dirty is None:
            self._dirty = loop.call_later(SYNC_S, self._begin_sync, loop)

    def _begin_sync(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sync beside the event loop, which a slow disk must not hold up."""
        self._dirty = None
        with self._writing:
            if self._file is None:  # closing has synced it
                return
            copy, name = (
                os.fdopen(os.dup(self._file.fileno()), "rb"),
                self._file.name,
            )  # the file may be closed meanwhile
        loop.run_in_executor(None, _end, copy, name)

    def close(self) -> None:
        """Close this rank's file; idempotent. What was kept is on the disk then, or a warning says that it may not be;
        nothing more is kept."""
        with self._writing:
            self._closed = True
            file, self._file = self._file, None
        if file is not None:
            _end(file, file.name)  # the sync that is due comes too late for a process that ends

    def _new_file(self) -> IO[bytes]:
        """Never one that an earlier start wrote: its end may be torn."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for start in count():
            path = self._folder / f"rank_{self._rank:05d}.{start}"
            if not path.exists():
                file = durable.opened(path, "xb")
                for folder in (self._folder, self._folder.parent):
                    durable.sync(folder)  # the names, too, outlive a lost machine
                return file
        raise AssertionError("unreachable")

    def _append(self, index: int, payload: bytes) -> None:
        assert self._file is not None
        self._file.write(_HEAD.pack(_MAGIC, index, len(payload), zlib.crc32(payload)) + payload)
        self._file.flush()


def _end(file: IO[bytes], name: str) -> None:
    """Sync an open file and close it. A failure ends no run: only after the loss of a machine is it missed."""
    try:
        with file:
            durable.sync_handle(file.fileno(), Path(name))
    except OSError as error:
        _log.warning("%s is perhaps not on the disk: %s", name, error.strerror)


def origins(folder: Path) -> Iterator[Origin]:
    """Yield where the files of a folder come from, as far as they say it."""
    for file in _files(folder):
        found = _origin(file, next(_records(file), None))
        if found is not None:
            yield found


def _files(folder: Path) -> Iterator[IO[bytes]]:
    """Yield the files of all ranks and starts, open; one that cannot be opened is skipped with a warning."""
    for path in sorted(folder.glob("rank_*")):
        try:
            file = path.open("rb")
        except OSError as error:
            _log.warning("%s is not used: it cannot be read (%s)", path, error.strerror)
            continue
        with file:
            yield file


def _records(file: IO[bytes]) -> Iterator[_Record]:
    """The records of a file, up to one that is not whole."""
    size, begin = file.seek(0, io.SEEK_END), 0
    while begin < size:
        file.seek(begin)
        head = file.read(_HEAD.size)
        magic, prompt, length, crc32 = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0, 0)
        begin += _HEAD.size
        if magic != _MAGIC or begin + length > size:
            _log.warning("%s: its last record is torn and not used", file.name)
            return
        yield _Record(prompt, begin, length, crc32)
        begin += length


def _payload(file: IO[bytes], record: _Record) -> bytes | None:
    file.seek(record.begin)
    payload = file.read(record.size)
    if zlib.crc32(payload) == record.crc32:
        return payload
    _log.warning("%s: the record at byte %d is damaged and not used", file.name, record.begin)
    return None


def _group(file: IO[bytes], record: _Record, prompt: Prompt) -> RolloutGroup | None:
    """The group of a record; None when it is damaged, or whole but of another program or version."""
    payload = _payload(file, record)
    if payload is None:
        return None
    try:
        return _decode(payload, prompt)
    except Exception as error:  # the bytes are what was written, but anything may have been
        cause = printable(f"{type(error).__name__}: {error}")
        _log.warning(
            "%s: the record at byte %d is no group of rollouts and not used (%s)", file.name, record.begin, cause
        )
        return None


def _segment(path: Path, record: _Record) -> Completion | None:
    """The segment of a record; None when it is damaged or of another program or version."""
    try:
        with path.open("rb") as file:
            payload = _payload(file, record)
        return None if payload is None else decode(payload)
    except Exception as error:  # the bytes are what was written, but anything may have been
        cause = printable(f"{type(error).__name__}: {error}")
        _log.warning("%s: the record at byte %d is no segment and not used (%s)", path, record.begin, cause)
        return None


def _origin(file: IO[bytes], first: _Record | None) -> Origin | None:
    """What the first record says; None when it is damaged, no JSON object, or of another version of the format."""
    payload = None if first is None or first.prompt != _ORIGIN else _payload(file, first)
    try:
        described = {} if payload is None else json.loads(payload)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        _log.warning("%s: its first record does not say where the rollouts come from; they are not used", file.name)
        return None
    return Origin(**described) if described.keys() == {field.name for field in fields(Origin)} else None


def _encode(group: RolloutGroup) -> bytes:
    """A group without its prompt."""
    described: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for i, trajectory in enumerate(group.trajectories):
        own, *branches = trajectory.sequences
        facts = {name: _plain(getattr(trajectory, name)) for name in _FACTS}
        described.append(facts | _described(own) | {"branches": [_described(branch) for branch in branches]})
        for sequence, prefix in zip(trajectory.sequences, _prefixes(i, len(branches))):
            values = {name: getattr(sequence.completion, name) for name in _ARRAYS}
            arrays |= {f"{prefix}.{name}": np.asarray(value) for name, value in values.items() if value is not None}
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(described).encode(), np.uint8)
    np.savez(buffer, allow_pickle=False, trajectories=text, **arrays)
    return buffer.getvalue()


def _prefixes(trajectory: int, branches: int) -> list[str]:
    """What the names of the arrays of each sequence of a trajectory begin with, its own first."""
    return [f"{trajectory}", *(f"{trajectory}.branch{number}" for number in range(branches))]


def _described(sequence: TokenSequence) -> dict[str, Any]:
    completion = sequence.completion
    return {
        "prompt_ids": sequence.prompt_ids,
        "finish_reason": completion.finish_reason,
        "weight_spans": [[span.version, span.start, span.end] for span in completion.weight_spans],
    }


def _decode(payload: bytes, prompt: Prompt) -> RolloutGroup:
    """The inverse of `_encode`."""
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        stored = json.loads(arrays["trajectories"].tobytes())
        return RolloutGroup(prompt, tuple(_trajectory(prompt, i, one, arrays) for i, one in enumerate(stored)))


def _trajectory(prompt: Prompt, number: int, described: dict[str, Any], arrays: Any) -> Trajectory:
    branches = described.get("branches", [])  # earlier versions wrote none
    own, *others = (
        _completion(of, {name: arrays.get(f"{prefix}.{name}") for name in _ARRAYS})
        for of, prefix in zip([described, *branches], _prefixes(number, len(branches)))
    )
    asked = tuple(described.get("prompt_ids", prompt.token_ids))
    return Trajectory(
        prompt if asked == prompt.token_ids else replace(prompt, token_ids=asked),
        own,
        **{name: described[name] for name in _FACTS if name in described},
        branches=tuple(Branch(tuple(of["prompt_ids"]), other) for of, other in zip(branches, others)),
    )


def _completion(described: dict[str, Any], arrays: dict[str, Any]) -> Completion:
    return Completion(
        token_ids=tuple(arrays["token_ids"].tolist()),
        log_probs=arrays["log_probs"],
        finish_reason=described["finish_reason"],
        weight_spans=tuple(WeightSpan(*span) for span in described["weight_spans"]),
        routed_experts=arrays["routed_experts"],
        loss_mask=arrays["loss_mask"],
        engines=arrays["engines"],
        teacher_log_probs=arrays["teacher_log_probs"],
        reference_log_probs=arrays["reference_log_probs"],
    )


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
