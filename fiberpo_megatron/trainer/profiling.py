"""This module writes traces of a running job on request: `fiberpo profile` asks, the run answers at its next step.

Before every step rank 0 looks for the request's file, and all ranks learn of it. The chosen ranks then record the next
steps with torch's profiler, with the names of `spans.py` in them, and each writes a trace in Chrome's trace event
format, which Perfetto opens. A trace that cannot be written is a warning: the run goes on. Nothing that is computed
changes.
"""

import gzip
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fiberpo_megatron import durable, spans
from fiberpo_megatron.closeable import Closeable
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.telemetry.profile_request import (
    PROFILES,
    REQUEST_FILE,
    ProfileRequest,
    ProfileStatus,
    read_request,
    trace_name,
    write_status,
)

_log = logging.getLogger(__name__)
COMPRESSION = 3
"""gzip's level: a trace is compressed while the other ranks wait."""


class EngineTraces(Protocol):
    """This is how the engines of a run are profiled; `engines.traces.PooledTraces` is the real one."""

    @property
    def count(self) -> int:
        """Return the number of engines."""
        ...

    def start(self, folder: Path, step: int, passes: int) -> list[str]:
        """Have every engine record its next forward passes; return what went wrong, a sentence each."""
        ...

    def finish(self, folder: Path, step: int) -> tuple[list[str], list[str]]:
        """End the recording; return the names of the traces in `folder`, and what went wrong."""
        ...


@dataclass
class _Active:
    """Is a profile that runs."""

    request: ProfileRequest
    first: int
    """Step with which it began."""
    problems: list[str]
    """What went wrong so far on this rank."""
    profiler: profile | None
    """That of this rank, if it is a chosen one."""


class NoProfiles:
    """Stands for `Profiles` in a run without a folder of its own."""

    def boundary(self, step: int) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


class Profiles(Closeable):
    """Answers requests for profiles on one rank of a run. Every rank has one, and calls `boundary` at the same steps.

    `engines` profiles the run's engines, on rank 0; `device` is where this rank computes ("cuda" adds the GPU's own
    activity and NVTX ranges); `say` writes a line for the person at the terminal.
    """

    def __init__(
        self,
        run_folder: Path,
        layout: Layout,
        device: str,
        say: Callable[[str], None],
        engines: EngineTraces | None = None,
    ) -> None:
        self._run_folder, self._layout, self._device, self._say = run_folder, layout, device, say
        self._engines = engines
        self._active: _Active | None = None
        self._answered = ""
        if layout.rank == 0:
            self._withdraw()  # a run that was killed left it behind
            self._report(ProfileStatus("ready", layout.world_size, engines.count if engines is not None else 0))

    @property
    def folder(self) -> Path:
        return self._run_folder / PROFILES

    def boundary(self, step: int) -> None:
        """End the profile that is complete before step `step`, and begin the one that was asked for since the last
        call. Every rank calls it before every step and after the last one."""
        if self._active is not None and step >= self._active.first + self._active.request.steps:
            self._finish()
        if self._active is None and self._layout.any_rank(self._asked()):
            self._begin(step)

    def end(self) -> None:
        """End a profile whose steps are not complete, because the run stops, and write what it has. Every rank calls
        it."""
        if self._active is not None:
            self._finish()

    def close(self) -> None:
        """Drop a profile that still runs, after an error for example, and a request; idempotent."""
        active, self._active = self._active, None
        spans.mark_with(None)
        if active is not None and active.profiler is not None:
            with suppress(RuntimeError):
                active.profiler.stop()
        if self._layout.rank == 0:
            self._withdraw()  # no run will answer it any more
        if active is not None and self._layout.rank == 0:
            problem = "the run ended before the profile was complete"
            self._report(self._status("done", active, (), (problem,)))

    def _asked(self) -> bool:
        """Look for a request that was not answered yet, on rank 0."""
        return self._layout.rank == 0 and (self._run_folder / REQUEST_FILE).exists()

    def _begin(self, step: int) -> None:
        request = self._shared_request()
        if request is None:
            return
        active = self._active = _Active(request, step, [], None)
        if self._layout.rank == 0:
            self._report(self._status("running", active))
            if request.engine_passes and self._engines is not None:
                active.problems += self._engines.start(self.folder, step, request.engine_passes)
        last = step + request.steps - 1
        steps = f"step {step}" if last == step else f"steps {step} to {last}"
        ranks = ", ".join(map(str, request.ranks)) or "none"
        self._say(f"Profiling {steps} as `fiberpo profile` asked: ranks {ranks}")
        if self._layout.rank in request.ranks:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device == "cuda")
            try:
                active.profiler = profile(activities=activities)
                active.profiler.start()
            except Exception as error:  # the profiler's libraries raise what they like, and the run must go on
                active.profiler = None
                active.problems.append(f"rank {self._layout.rank} could not start torch's profiler ({_cause(error)})")
            else:
                spans.mark_with(_cuda_mark if self._device == "cuda" else record_function)

    def _shared_request(self) -> ProfileRequest | None:
        """Return the request that rank 0 reads, on every rank; None if it is no new one or cannot be read."""
        text = "null"
        if self._layout.rank == 0:
            try:
                request = read_request(self._run_folder)
                if request.id != self._answered:
                    text = json.dumps(asdict(request))
            except (OSError, ValueError) as error:
                self._say(f"WARNING: the request of a profile cannot be read: {error}")
                self._withdraw()
        found = json.loads(self._layout.share_text(text if self._layout.rank == 0 else None))
        if found is None:
            return None
        request = ProfileRequest(**{**found, "ranks": tuple(found["ranks"])})
        self._answered = request.id
        return request

    def _finish(self) -> None:
        active, self._active = self._active, None
        assert active is not None
        spans.mark_with(None)
        names = []
        if active.profiler is not None:
            try:
                names.append(self._written(active, active.profiler))
            except Exception as error:  # torch's exporter raises what it likes, and the run must go on
                active.problems.append(f"the trace of rank {self._layout.rank} is not written ({_cause(error)})")
        if self._layout.rank == 0 and active.request.engine_passes and self._engines is not None:
            found, problems = self._engines.finish(self.folder, active.first)
            names += found
            active.problems += problems
        gathered = self._layout.gather_json({"files": names, "problems": active.problems})
        files = tuple(name for one in gathered for name in one["files"])
        every = tuple(problem for one in gathered for problem in one["problems"])
        for problem in every:
            self._say(f"WARNING: {problem}. The run goes on")
        self._say(f"Profile: {len(files)} trace{'' if len(files) == 1 else 's'} in {self.folder}")
        if self._layout.rank == 0:
            self._withdraw()
            self._report(self._status("done", active, files, every))

    def _written(self, active: _Active, profiler: profile) -> str:
        """Write this rank's trace, whole, and return its name."""
        profiler.stop()
        rank = self._layout.rank
        name = trace_name(active.first, rank)
        with durable.explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        plain = self.folder / f".{name}.plain"
        try:
            profiler.export_chrome_trace(str(plain))
            _require_whole(plain)
            with (
                durable.replaced(self.folder / name) as file,
                gzip.GzipFile("", "wb", COMPRESSION, file) as packed,
                plain.open("rb") as trace,
            ):
                shutil.copyfileobj(trace, packed, 1 << 20)
        finally:
            plain.unlink(missing_ok=True)
        return name

    def _status(
        self, state: Any, active: _Active, files: tuple[str, ...] = (), problems: tuple[str, ...] = ()
    ) -> ProfileStatus:
        engines = self._engines.count if self._engines is not None else 0
        blank = ProfileStatus(state, self._layout.world_size, engines)
        return replace(blank, id=active.request.id, step=active.first, files=files, problems=problems)

    def _report(self, status: ProfileStatus) -> None:
        try:
            write_status(self._run_folder, status)
        except OSError as error:
            _log.warning("the status of profiles is not written, `fiberpo profile` waits in vain: %s", error)

    def _withdraw(self) -> None:
        try:
            (self._run_folder / REQUEST_FILE).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s cannot be deleted, delete it by hand: %s", self._run_folder / REQUEST_FILE, error)


def _require_whole(path: Path) -> None:
    """Raise OSError if torch left a trace unfinished: its writer does not say that a disk is full."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"torch wrote {size / 2**20:.1f} MiB of it and not the end; is the disk full?")


@contextmanager
def _cuda_mark(name: str) -> Iterator[None]:
    """Mark a span in torch's trace, and as an NVTX range for NVIDIA's own profilers."""
    with record_function(name):
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
