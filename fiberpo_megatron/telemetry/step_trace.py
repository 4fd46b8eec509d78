"""This module writes the trace of a step, <run>/traces/step_000012.json.gz, and reads it for the report.

It is in Chrome's trace event format, which Perfetto opens: a process for the trainer's phases, one for the trajectories
with a thread for each of them (the one that ended last comes first), and one for each engine with its requests in as
many threads as it had requests at the same time. Times are microseconds since 1970, so that the traces of neighbouring
steps belong together.
"""

import gzip
import heapq
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.telemetry.step_files import StepFiles
from fiberpo_megatron.telemetry.timers import Block
from fiberpo_megatron.tracks import IDLE

VERSION = 1
TRACES = StepFiles("traces", "step", ".json.gz")
COMPRESSION = 1
"""Level of gzip: other ranks wait meanwhile."""
MOST_BYTES = 1 << 28
"""Bytes of a trace that is still read: some 100,000 trajectories."""
LONGEST_NAME = 120
"""Characters of a prompt's name."""
TRAINER, TRAJECTORIES, ENGINES = 1, 2, 100
"""Process ids; engine e has ENGINES + e."""
FIRST_THREAD = 1000
"""Thread ids begin beyond the process ids: Perfetto takes a thread with its process's id for the main one."""
WAITING, TRAINING = "waiting", "training"
"""What becomes of a trajectory that has ended: it waits for the others of its step, then the trainer has it."""

Event = dict[str, Any]


@dataclass(frozen=True)
class TracedTrajectory:
    """This is one trajectory of a trace; times in s since 1970."""

    name: str
    """That of its prompt: environment and id."""
    sample: int
    leader: int
    """The data-parallel rank that had it sampled."""
    began: float
    ended: float | None
    """None if it was cancelled."""
    tokens: int
    requests: int
    engines: tuple[int, ...]
    seconds: Mapping[str, float]
    """Time in each phase, waiting and training not among them."""
    stretches: tuple[tuple[str, float, float], ...]
    """(phase, begin, end), and then waiting and training."""


@dataclass(frozen=True)
class StepTrace:
    """This is a step as its trace has it; times in s since 1970."""

    step: int
    begin: float
    """When the trainer began it: at the end of the step before, whose evaluation and checkpoint are in this one."""
    end: float
    blocks: tuple[Block, ...]
    """Phases of the trainer."""
    trajectories: tuple[TracedTrajectory, ...]
    """The one that ended last comes first; cancelled ones are at the end."""

    @property
    def last(self) -> TracedTrajectory | None:
        """Return the trajectory for which all others had to wait; None if none has ended."""
        return next((one for one in self.trajectories if one.ended is not None), None)

    @property
    def tail_s(self) -> float:
        """Return the time from the end of the median trajectory to that of the last one."""
        return tail_seconds([one.ended for one in self.trajectories if one.ended is not None])

    def parts(self) -> dict[str, float]:
        """Return where the step's time went: seconds by part, which add up to the whole step.

        Until half of the trajectories have ended, the trainer's wait for them counts as what the unfinished ones did in
        it, each moment by the number of them in each phase; from then on it counts as `waiting`. The other parts are
        the trainer's phases, and `other`.
        """
        found: dict[str, float] = {}
        for phase, begin, end in self._outermost():
            parts = self._generation(begin, end) if phase == "generate" else {phase: end - begin}
            for part, seconds in parts.items():
                found[part] = found.get(part, 0.0) + seconds
        return {**found, "other": self.end - self.begin - sum(found.values())}

    def _outermost(self) -> Iterator[Block]:
        """Yield the blocks that lie in no other, in their order."""
        until = self.begin
        for phase, begin, end in sorted(self.blocks, key=lambda block: (block[1], -block[2])):
            if begin >= until - 1e-6:  # times of a trace are whole microseconds
                yield phase, begin, end
                until = end

    def _generation(self, begin: float, end: float) -> dict[str, float]:
        """Return the parts of a wait for trajectories."""
        ended = sorted(one.ended for one in self.trajectories if one.ended is not None)
        if not ended:
            return {}
        half = min(max(ended[(len(ended) - 1) // 2], begin), end)
        found = _shares(self.trajectories, begin, half)
        return {**found, WAITING: max(0.0, min(ended[-1], end) - half)}


def tail_seconds(ended: Sequence[float]) -> float:
    """Return the time from the median of some times to the last one; the lower median of an even number."""
    ordered = sorted(ended)
    return ordered[-1] - ordered[(len(ordered) - 1) // 2] if ordered else 0.0


def _shares(trajectories: Iterable[TracedTrajectory], begin: float, end: float) -> dict[str, float]:
    """Return the seconds between two times by what the unfinished trajectories did in them."""
    changes: list[tuple[float, str, int]] = []

    def add(name: str, first: float, last: float) -> None:
        first, last = max(first, begin), min(last, end)
        if first < last:
            changes.extend([(first, name, 1), (last, name, -1)])

    for one in trajectories:
        if one.ended is not None:
            add("", one.began, one.ended)
            for phase, first, last in one.stretches:
                add(phase, first, min(last, one.ended))
    found: dict[str, float] = {}
    now, running = begin, Counter[str]()
    for at, name, by in sorted(changes):
        unfinished = running[""]
        if at > now and unfinished:
            known = {phase: number for phase, number in running.items() if phase and number}
            idle = unfinished - sum(known.values())  # stretches of long lives that were not kept are among them
            for phase, number in {**known, IDLE: known.get(IDLE, 0) + idle}.items():
                if number:
                    found[phase] = found.get(phase, 0.0) + (at - now) * number / unfinished
        now = at
        running[name] += by
    return found


def write_trace(
    run_folder: Path, step: int, tracks: Sequence[Mapping[str, Any]], blocks: Sequence[Block], *, keep: int
) -> Path:
    """Write the trace of a step.

    A file of the same step is replaced (a resumed step). Files of earlier steps are deleted when there are more than
    `keep`, see `StepFiles.prune`. Raises OSError.

    Args:
        tracks: `Track.facts` of all leaders' trajectories, with the data-parallel rank that had them sampled as
            `leader`.
        blocks: those of `PhaseTimers.blocks`.
    """
    path = TRACES.path(run_folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = {"traceEvents": list(events(step, tracks, blocks)), "otherData": {"version": VERSION, "step": step}}
    with (
        durable.replaced(path) as file,
        gzip.GzipFile("", "wb", compresslevel=COMPRESSION, fileobj=file, mtime=0) as packed,
    ):
        packed.write(json.dumps(trace, separators=(",", ":")).encode())
    TRACES.prune(run_folder, keep)
    return path


def events(step: int, tracks: Sequence[Mapping[str, Any]], blocks: Sequence[Block]) -> Iterator[Event]:
    """Yield the events of a step's trace; the arguments are those of `write_trace`."""
    yield _name("process_name", TRAINER, 0, "trainer, rank 0")
    for phase, begin, end in blocks:
        yield _slice("trainer", phase, TRAINER, TRAINER, begin, end)
    taken = max((end for phase, _, end in blocks if phase == "generate"), default=None)
    trained = max((end for phase, _, end in blocks if phase == "train"), default=None)
    yield _name("process_name", TRAJECTORIES, 0, f"trajectories of step {step}")
    ordered = sorted(tracks, key=lambda track: (track["ended"] is None, -(track["ended"] or 0.0)))
    for thread, track in enumerate(ordered, FIRST_THREAD):
        yield from _trajectory(thread, track, taken, trained)
    yield from _engines(step, tracks, FIRST_THREAD + len(tracks))


def _trajectory(thread: int, track: Mapping[str, Any], taken: float | None, trained: float | None) -> Iterator[Event]:
    """Yield a trajectory's life; `taken` and `trained` are the times up to which its step waited and trained."""
    title, ended = _title(track), track["ended"]
    facts = {name: track[name] for name in ("sample", "leader", "tokens", "requests", "seconds")}
    facts["name"] = str(track["name"])[:LONGEST_NAME]
    facts["engines"] = sorted({segment[0] for segment in track["segments"]})
    facts["cancelled"] = ended is None
    until = track["began"] + sum(track["seconds"].values()) if ended is None else ended
    yield _name("thread_name", TRAJECTORIES, thread, title)
    yield _slice("trajectory", title, TRAJECTORIES, thread, track["began"], until, facts)
    for phase, begin, end in track["stretches"]:
        yield _slice("phase", phase, TRAJECTORIES, thread, begin, end)
    if ended is not None and taken is not None:
        if taken > ended:
            yield _slice("phase", WAITING, TRAJECTORIES, thread, ended, taken)
        if trained is not None and trained > taken:
            yield _slice("phase", TRAINING, TRAJECTORIES, thread, max(ended, taken), trained)


def _engines(step: int, tracks: Sequence[Mapping[str, Any]], thread: int) -> Iterator[Event]:
    """Yield the requests of each engine; each takes the first thread that is free, from `thread` on."""
    requests: dict[int, list[tuple[float, float, str, dict[str, Any]]]] = {}
    for track in tracks:
        for engine, begin, end, tokens, versions, finish in track["segments"]:
            facts: dict[str, Any] = {"tokens": tokens, "finish_reason": finish, "leader": track["leader"]}
            facts["weight_versions"] = list(versions)
            known = [int(version) for version in versions if version.isdecimal()]
            if known:
                facts["lag"] = step - min(known)
            requests.setdefault(engine, []).append((begin, end, _title(track), facts))
    for engine in sorted(requests):
        pid = ENGINES + engine
        yield _name("process_name", pid, 0, f"engine {engine}")
        free: list[tuple[float, int]] = []  # a heap of threads by the end of their last request
        for begin, end, title, facts in sorted(requests[engine], key=lambda request: request[:2]):
            if free and free[0][0] <= begin:
                slot = heapq.heappop(free)[1]
            else:
                slot, thread = thread, thread + 1
                yield _name("thread_name", pid, slot, "requests")
            heapq.heappush(free, (end, slot))
            yield _slice("request", title, pid, slot, begin, end, facts)


def _title(track: Mapping[str, Any]) -> str:
    return f"{str(track['name'])[:LONGEST_NAME]}, sample {track['sample']}"


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(
    category: str, name: str, pid: int, tid: int, begin: float, end: float, args: Mapping[str, Any] | None = None
) -> Event:
    first, last = round(begin * 1e6), round(end * 1e6)
    event = {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "ts": first, "dur": max(0, last - first)}
    return event if args is None else {**event, "args": args}


def read_trace(path: Path) -> StepTrace:
    """Return the trace in a file. Raises OSError, and ValueError for what `write_trace` does not write."""
    try:
        with gzip.open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB; open it in Perfetto")
        trace = json.loads(text)
        version = trace["otherData"]["version"]
        if version != VERSION:
            raise ValueError(
                f"it has version {version!r} of the format, and this package reads {VERSION}; use the package that "
                "wrote it"
            )
        return _from_events(int(trace["otherData"]["step"]), trace["traceEvents"])
    except (EOFError, zlib.error, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"traces/{path.name} is not the trace of a step ({type(error).__name__}: {error})") from error


def _from_events(step: int, found: Sequence[Event]) -> StepTrace:
    blocks: list[Block] = []
    outer: dict[int, Event] = {}
    inner: dict[int, list[tuple[str, float, float]]] = {}
    for event in found:
        if event["ph"] != "X":
            continue
        begin = float(event["ts"]) / 1e6
        block = str(event["name"]), begin, begin + float(event["dur"]) / 1e6
        if event["cat"] == "trainer":
            blocks.append(block)
        elif event["cat"] == "trajectory":
            outer[event["tid"]] = event
        elif event["cat"] == "phase":
            inner.setdefault(event["tid"], []).append(block)
    (_, begin, end), *blocks = blocks  # the step itself comes first
    trajectories = []
    for thread, event in outer.items():
        facts, began = event["args"], float(event["ts"]) / 1e6
        trajectories.append(
            TracedTrajectory(
                str(facts["name"]),
                int(facts["sample"]),
                int(facts["leader"]),
                began,
                None if facts["cancelled"] else began + float(event["dur"]) / 1e6,
                int(facts["tokens"]),
                int(facts["requests"]),
                tuple(int(engine) for engine in facts["engines"]),
                {str(phase): float(seconds) for phase, seconds in facts["seconds"].items()},
                tuple(inner.get(thread, ())),
            )
        )
    return StepTrace(step, begin, end, tuple(blocks), tuple(trajectories))
