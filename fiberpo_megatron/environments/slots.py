"""This module looks after the worker processes of a pool: their start, their bounds and their end."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

from fiberpo_megatron.environments import wire
from fiberpo_megatron.environments.jobs import Job
from fiberpo_megatron.environments.process import FrameRefused, WorkerLog, WorkerProcess, describe_exit
from fiberpo_megatron.environments.results import FailureKind
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.environments.wire import Kind
from fiberpo_megatron.plugins import PluginError

TICK_S = 0.05
"""Time between two looks at a worker."""
TRACEBACK_S = 3.0
"""How long a worker that is to be killed may take to write where it stands. It needs some milliseconds, but a busy
machine may leave it without a processor for much longer."""


@dataclass(frozen=True)
class Doom:
    """Says why a worker is being ended, and because of which job; 0 means that the job is unknown."""

    job: int
    kind: FailureKind
    message: str


class Slot:
    """Holds the place of one worker, whose processes follow each other.

    python: the interpreter. settings: the payload of the frame that starts a worker.
    on_frame: called with (slot, kind, job, payload) for the replies of a worker.
    on_death: called with (slot, doom, traceback) when a worker that was usable has ended.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        python: str,
        settings: bytes,
        log: WorkerLog,
        on_frame: Callable[["Slot", int, int, bytes], None],
        on_death: Callable[["Slot", Doom, str], None],
    ) -> None:
        self._config = config
        self._python = python
        self._settings = settings
        self._log = log
        self._on_frame = on_frame
        self._on_death = on_death
        self.process: WorkerProcess | None = None
        self.usable = False
        self.calls: dict[int, Job] = {}
        """Jobs of the process that call a method once, by number, in their order."""
        self.runs: dict[int, Job] = {}
        """Conversations of the process by number."""
        self.retiring = False
        """Whether the process gets no more jobs, because a failed job has left a thread running in it."""
        self.served: set[Kind] = set()
        """Kinds of calls of which the process has ended one."""
        self.late = False
        """Whether the call that the process works on takes so long that no other should wait behind it."""
        self._doom: Doom | None = None
        self._asked_at = 0
        self._place = ""
        """What the process that was asked had written about where it stands at the last look."""
        self._first: tuple[Job, int] | None = None
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._ready_at = 0

    @property
    def takes_jobs(self) -> bool:
        """Return whether the process may get another job."""
        lives = self.process is not None and not self.process.closed
        return self.usable and lives and self._doom is None and not self.retiring

    def job(self, number: int) -> Job | None:
        """Return the job of this number, if the process has it."""
        return self.calls.get(number) or self.runs.get(number)

    def place_of(self, job: Job) -> dict[int, Job]:
        """Return `calls` or `runs`, wherever a job belongs."""
        return self.runs if job.kind == Kind.RUN else self.calls

    def first_call(self, now: int) -> tuple[Job, float] | None:
        """Return the call that the process works on, and for how many seconds it has been the first. Ask at every tick.

        now: CLOCK_MONOTONIC in ns.
        """
        job = next((job for job in self.calls.values() if not job.future.done()), None)
        if job is None:
            self._first = None
            return None
        if self._first is None or self._first[0] is not job:
            self._first = job, now
        return job, (now - self._first[1]) / 1e9

    # ---- start ----

    async def start(self) -> dict[str, Any]:
        """Start a process, wait until it is ready and return its description. Raises PluginError."""
        self._doom, self.retiring, self.late, self.served = None, False, False, set()
        self._ready = asyncio.get_running_loop().create_future()
        process = self.process = WorkerProcess(self._python, self._log, self._received, self._check, self._refused)
        process.send(Kind.START, 0, self._settings)
        try:
            done, _ = await asyncio.wait({self._ready}, timeout=self._config.start_timeout_s)
            if not done:
                raise PluginError(await self._why_late(process))
            description = self._ready.result()
            if self.process is None:
                raise PluginError(f"environment {self._config.name!r}: a worker ended as soon as it was ready")
        except BaseException:
            process.kill()
            raise
        finally:
            self._ready = None
        self._ready_at = monotonic_ns()
        self.usable = True
        return description

    async def _why_late(self, process: WorkerProcess) -> str:
        self._ask_where(process)
        while self.process is process and not self._answered(process, monotonic_ns()):
            await asyncio.sleep(TICK_S)
        place = process.last_output() if self.process is None else process.page.traceback()
        return (
            f"environment {self._config.name!r}: {self._config.use} was not ready in start_timeout_s = "
            f"{self._config.start_timeout_s:g} s; make importing the module and making the instance faster, or raise "
            f"start_timeout_s. It was here:\n{place}"
        )

    # ---- frames ----

    def _received(self, kind: int, number: int, payload: bytes) -> None:
        if kind in (Kind.READY, Kind.REFUSED):
            if self._ready is not None and not self._ready.done():
                fields = json.loads(payload)
                if kind == Kind.READY:
                    self._ready.set_result(fields)
                else:
                    self._ready.set_exception(PluginError(fields["message"]))
        elif self._doom is None or self._doom.job != number:  # else its time was up before
            self._on_frame(self, kind, number, payload)

    def _check(self, kind: int, number: int, length: int) -> None:
        """Refuse a frame by its header."""
        if kind in (Kind.READY, Kind.REFUSED, Kind.FAILED) and length <= wire.ERROR_BYTES:
            return
        if kind not in (Kind.DONE, Kind.SAY):
            raise FrameRefused(number, "invalid", "its process wrote something else than replies into the reply pipe")
        job = self.job(number)
        output = length
        if job is not None:
            job.output += length
            output = job.output
        if output > self._config.output_kib * 1024:
            raise FrameRefused(
                number,
                "output",
                f"its output is {output / 1024:.0f} KiB, above output_kib = {self._config.output_kib}; write less, or "
                "raise output_kib",
            )

    def _refused(self, refused: FrameRefused) -> None:
        self._end(refused.job, refused.kind, str(refused))

    # ---- bounds and end ----

    def _end(self, job: int, kind: FailureKind, message: str) -> None:
        """End the process because of a job (0: which one is unknown), once it has written where it is."""
        if self._doom is None and self.process is not None:
            self._doom = Doom(job, kind, message)
            self._ask_where(self.process)  # `look_after` kills it when it has answered

    def _ask_where(self, process: WorkerProcess) -> None:
        self._asked_at, self._place = monotonic_ns(), ""
        process.ask_where()

    def _answered(self, process: WorkerProcess, now: int) -> bool:
        """Return whether a process has written where it stands, or has had its time for that. Ask at every tick."""
        before, self._place = self._place, process.page.traceback()
        return bool(before and before == self._place) or now - self._asked_at > TRACEBACK_S * 1e9

    def stop(self, job: Job, message: str) -> bool:
        """Have the process end a job that was cut; return whether the process itself has to end for that.

        It then fails the job with this message when it is dead, with the place where it stood.
        """
        process = self.process
        if process is None or self._doom is not None:
            return False
        if self._holds(process, job):
            self._end(job.id, "deadline", message)
            return True
        process.send(Kind.CANCEL, job.id, b"")
        return False

    def _holds(self, process: WorkerProcess, job: Job) -> bool:
        holder = process.page.holder()
        return holder is not None and holder[0] == job.id

    def look_after(self, now: int, resumed_at: int, *, memory: bool) -> None:
        """Take what the process has printed, end it when a bound is exceeded, and deal with its end.

        now: CLOCK_MONOTONIC in ns. resumed_at: when the trainer went on after a pause; holding the event loop is
        counted from then on at the earliest. memory: look at the memory, too.
        """
        process = self.process
        if process is None:
            return
        process.read_output()
        if process.exit_code() is not None:
            self._bury(process)
        elif self._doom is not None:
            if self._answered(process, now):
                process.kill()
        elif self.usable:
            if self.retiring and not self.calls and not self.runs:
                process.kill()
            else:
                self._check_time(process, now, resumed_at)
                if memory:
                    self._check_memory(process)

    def _check_time(self, process: WorkerProcess, now: int, resumed_at: int) -> None:
        deadline_s = self._config.deadline_s
        holder = process.page.holder()
        if holder is not None:
            job, since, before = holder
            held = self.job(job)
            if held is not None and held.cut:
                self._end(job, "deadline", "it was cut, but went on")
            elif before + now - max(since, resumed_at) > deadline_s * 1e9:
                self._end(job, "deadline", f"it held its worker longer than deadline_s = {deadline_s:g} s")
        elif self.calls or self.runs:
            heard = max(process.page.last_beat(), self._ready_at, resumed_at)
            if now - heard > (deadline_s + 1) * 1e9:  # a callback or a thread keeps the interpreter
                self._end(0, "deadline", f"its worker did not respond for deadline_s = {deadline_s:g} s")

    def _check_memory(self, process: WorkerProcess) -> None:
        bound = int(self._config.memory_gib * 2**30)
        if process.memory(bound) > bound:
            holder = process.page.holder()
            message = (
                f"its worker and the processes started there use more than memory_gib = {self._config.memory_gib:g}; "
                "use less memory, lower `concurrent`, or raise memory_gib"
            )
            self._end(holder[0] if holder else 0, "memory", message)

    def _bury(self, process: WorkerProcess) -> None:
        """Read what an ended process has left, release it, and report its end."""
        was_usable, self.usable = self.usable, False
        process.read_rest()
        process.read_output()
        code = process.exit_code()
        assert code is not None
        holder, trace, last = process.page.holder(), process.page.traceback(), process.last_output()
        process.release()
        self.process = None
        if was_usable:
            message = f"its worker process {describe_exit(code)}" + (f"; its last output:\n{last}" if last else "")
            doom = self._doom or Doom(holder[0] if holder else 0, "died", message)
            self._on_death(self, doom, trace)
        elif self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                PluginError(
                    f"environment {self._config.name!r}: the worker {describe_exit(code)} before it was ready; its "
                    f"last output:\n{last or '(nothing)'}"
                )
            )
