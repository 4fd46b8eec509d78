"""This module keeps pools of worker processes, so that a user's environment cannot stop, slow or crash the trainer.

    pool = EnvironmentPool(config, folder=run_folder / "environments")
    description = await pool.start()
    tasks = await pool.tasks("train", range(8))
    outcome = await pool.score(tasks[0], Turn("42"), seed=1)    # an Outcome, or a Failure
    await pool.close()

A worker that blocks, dies or uses too much memory is ended. Only the job whose code held the worker's event loop then
fails; the others start again in a new worker with the same task and seed. If no job held it, all of them start again,
but fewer of them share a worker each time, until the one that is at fault is alone.
"""

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import Any, Literal

from fiberpo_megatron.environments import Outcome, Split, Task, Trajectory, Turn, wire
from fiberpo_megatron.environments.jobs import ConversationJob, Job, Say
from fiberpo_megatron.environments.process import (
    FrameRefused,
    WorkerLog,
    WorkerProcess,
    describe_exit,
    interpreter,
)
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.environments.wire import InvalidReply, Kind
from fiberpo_megatron.plugins import PluginError

TICK_S = 0.05
MEMORY_TICKS = 5
"""Ticks between two looks at the memory of the workers."""
TRACEBACK_S = 0.1
"""How long a worker that is to be killed may take to write where it stands."""
CLOSE_S = 2.0
"""How long a worker may take to end when it is asked to; then it is killed."""
START_ATTEMPTS = 3
"""How often a worker is started again during a run before the run ends."""
CRASHES = 3
"""After so many crashes in a row whose cause is unknown, the only job of a worker becomes a failure."""
QUEUE_S = 0.02
QUEUE_LIMIT = 32
"""Calls are sent to a worker ahead of their turn up to this time and number, so that it never waits for the trainer."""

FailureKind = Literal["exception", "deadline", "died", "memory", "output", "invalid"]


@dataclass(frozen=True)
class Description:
    """Says what an environment's instance offers."""

    path: str
    """Import path of the class."""
    version: str | None
    """Distribution and version that it came from; None for a file of no package."""
    train_size: int
    held_out_size: int
    single_turn: bool
    """Whether the policy answers once: use `score` or `score_group`, not `run`."""
    scores: bool
    """Whether the class has `score`."""
    scores_groups: bool
    """Whether the class has `score_group`."""
    deterministic: bool
    check_all_tasks: bool
    """Whether all tasks are checked before a run starts."""
    chat_template_kwargs: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """Says why a trajectory has no outcome; the settings' `on_failure` says what becomes of it."""

    kind: FailureKind
    """exception: the class raised; deadline: it took too long; died: it ended its process; memory: it used too much;
    output: it wrote too much; invalid: it returned something that its method must not return."""
    message: str
    """One sentence that names the environment, the task and the cause."""
    traceback: str = ""


class EnvironmentFailed(RuntimeError):
    """An environment cannot go on: it gives no task, or its workers no longer start."""


@dataclass
class _Doom:
    """Says why a worker is being ended, and because of which job; 0 means that the job is unknown."""

    job: int
    kind: FailureKind
    message: str


@dataclass(eq=False)
class _Slot:
    """Holds the place of one worker, whose processes follow each other."""

    number: int
    log: WorkerLog
    process: WorkerProcess | None = None
    ready: asyncio.Future[dict[str, Any]] | None = None
    """The description, once a starting process has sent it."""
    usable: bool = False
    calls: dict[int, Job] = field(default_factory=dict)
    runs: dict[int, Job] = field(default_factory=dict)
    doom: _Doom | None = None
    retiring: bool = False
    """Whether the process gets no more jobs, because a failed job has left a thread running in it."""
    ready_at: int = 0

    def job(self, number: int) -> Job | None:
        return self.calls.get(number) or self.runs.get(number)

    def place_of(self, job: Job) -> dict[int, Job]:
        return self.runs if job.kind == Kind.RUN else self.calls


class EnvironmentPool:
    """Runs the worker processes of one environment. Call all coroutines on one event loop, that of `start`.

    folder: gets the workers' output and the failures; None keeps no files.
    rank: appears in the files' names.
    """

    def __init__(self, config: EnvironmentConfig, *, folder: Path | None, rank: int = 0) -> None:
        self._config = config
        self._folder = folder
        self._prefix = f"{config.name}_rank{rank:05d}"
        self._slots: list[_Slot] = []
        self._waiting_calls: deque[Job] = deque()
        self._waiting_runs: deque[Job] = deque()
        self._counts: Counter[str] = Counter()
        self._jobs = 0
        self._call_s = 2 * QUEUE_S
        """Running median of the time that a call takes in a worker; a mean would follow a busy machine's pauses."""
        self._description: Description | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._starts: set[asyncio.Task[None]] = set()
        self._ended: str | None = None
        """Why the pool takes no more jobs."""
        self._resumed_at = 0
        """When the trainer's event loop turned again after a pause; what workers did before is not held against them
        a second time."""

    # ---- life ----

    async def start(self) -> Description:
        """Start the workers and return what the environment offers.

        Raises plugins.PluginError with the cause and the fix when the class, its options, its version or its
        interpreter cannot be used, or when a worker is not ready in `start_timeout_s`.
        """
        if self._slots:
            raise RuntimeError("EnvironmentPool.start() was called a second time")
        self._python = interpreter(self._config.python, self._config.name)
        self._settings = self._worker_settings()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(self._config.workers):
            path = self._folder and self._folder / f"{self._prefix}_worker{number}.log"
            self._slots.append(_Slot(number, WorkerLog(path)))
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        try:
            described = await asyncio.gather(*map(self._start_worker, self._slots))
            for other in described[1:]:
                if other != described[0]:
                    raise PluginError(
                        f"environment {self._config.name!r}: two instances of {described[0]['path']} describe "
                        f"themselves differently, as {wire.short(described[0])} and as {wire.short(other)}; sizes and "
                        "settings must not depend on chance or time"
                    )
        except BaseException:
            await self.close()
            raise
        self._description = Description(**described[0])
        return self._description

    def _worker_settings(self) -> bytes:
        config = self._config
        try:
            options = wire.plain(config.options, "options")
        except InvalidReply as error:
            raise PluginError(f"environment {config.name!r}: {error}") from error
        settings = {
            "name": config.name,
            "use": config.use,
            "options": options,
            "version": config.version,
            "deadline_s": config.deadline_s,
            "memory_gib": config.memory_gib,
            "output_kib": config.output_kib,
        }
        return wire.encode(settings)

    async def _start_worker(self, slot: _Slot) -> dict[str, Any]:
        """Start a process in a slot and wait until it is ready. Raises PluginError."""
        slot.doom, slot.retiring = None, False
        slot.ready = asyncio.get_running_loop().create_future()
        slot.process = WorkerProcess(
            self._python,
            slot.log,
            lambda kind, job, payload: self._received(slot, kind, job, payload),
            lambda kind, job, length: self._check(slot, kind, job, length),
            lambda refused: self._refused(slot, refused),
        )
        slot.process.send(Kind.START, 0, self._settings)
        timeout = self._config.start_timeout_s
        try:
            done, _ = await asyncio.wait({slot.ready}, timeout=timeout)
            if not done:
                slot.process.ask_where()
                await asyncio.sleep(TRACEBACK_S)
                raise PluginError(
                    f"environment {self._config.name!r}: {self._config.use} was not ready in start_timeout_s = "
                    f"{timeout:g} s; make importing the module and making the instance faster, or raise "
                    f"start_timeout_s. It was here:\n{slot.process.page.traceback() or slot.process.last_output()}"
                )
            description = slot.ready.result()
            if slot.process is None:
                raise PluginError(f"environment {self._config.name!r}: a worker ended as soon as it was ready")
        except BaseException:
            slot.ready = None
            if slot.process is not None:
                slot.process.kill()
            raise
        slot.ready = None
        slot.ready_at = monotonic_ns()
        slot.usable = True
        return description

    async def _restart_worker(self, slot: _Slot) -> None:
        """Start the next process of a slot; the pool ends when that keeps failing."""
        for attempt in range(START_ATTEMPTS):
            try:
                await self._start_worker(slot)
            except PluginError as error:
                await self._gone(slot)
                if attempt == START_ATTEMPTS - 1:
                    self._end(f"environment {self._config.name!r} has lost a worker that does not start again: {error}")
            else:
                self._dispatch()
                return

    async def _gone(self, slot: _Slot) -> None:
        while slot.process is not None:  # `_watch` reaps it
            await asyncio.sleep(TICK_S)

    async def close(self) -> None:
        """End the workers and all that they started; for a moment they may end in good order."""
        self._end(f"the pool of environment {self._config.name!r} was closed")
        for task in (*self._starts, self._watcher):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        processes = [slot.process for slot in self._slots if slot.process is not None]
        for process in processes:
            process.close_commands()
        deadline = monotonic() + CLOSE_S
        while monotonic() < deadline and None in {process.exit_code() for process in processes}:
            for process in processes:
                process.read_output()
            await asyncio.sleep(0.01)
        for process in processes:
            process.kill()
            while process.exit_code() is None:  # SIGKILL ends it soon, whatever it does
                await asyncio.sleep(0.01)
            process.read_output()
            process.release()
        for slot in self._slots:
            slot.process, slot.usable = None, False

    def _end(self, reason: str) -> None:
        """Take no more jobs, and fail those that were taken."""
        self._ended = self._ended or reason
        jobs = [*self._waiting_calls, *self._waiting_runs]
        self._waiting_calls.clear()
        self._waiting_runs.clear()
        for slot in self._slots:
            jobs += [*slot.calls.values(), *slot.runs.values()]
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(EnvironmentFailed(self._ended))

    def take_counts(self) -> Counter[str]:
        """Return what was counted since the last call: `failures`, `failures/KIND`, `restarted` conversations and
        `worker_deaths`."""
        counts, self._counts = self._counts, Counter()
        return counts

    # ---- what the trainer asks ----

    async def tasks(self, split: Split, indices: Sequence[int]) -> list[Task]:
        """Return the tasks at `indices` of range(train_size) or range(held_out_size).

        Raises EnvironmentFailed that names environment, split, index and cause when the class raises, returns no Task,
        or takes longer than `deadline_s` for one of them; IndexError for an index outside the range.
        """
        description = self._described()
        size = description.train_size if split == "train" else description.held_out_size
        for index in indices:
            if not 0 <= index < size:
                raise IndexError(f"{self._config.name} has no {split} task {index}; there are {size}")

        def decoder(index: int) -> Callable[[Any], Task]:
            return lambda fields: Task(
                fields["prompt"],
                fields["answer"],
                fields["metadata"],
                fields["id"] or f"{self._config.name}/{split}/{index}",
            )

        jobs = [
            self._job(Kind.TASK, {"split": split, "index": i}, f"{split}({i})", None, i, decoder(i)) for i in indices
        ]
        try:
            for job in jobs:
                self._submit(job)
            found = []
            for job in jobs:
                result = await job.future
                if isinstance(result, Failure):
                    raise EnvironmentFailed(f"{result.message}\n{result.traceback}".rstrip())
                found.append(result)
            return found
        finally:
            for job in jobs:
                self._release(job)

    async def score(self, task: Task, turn: Turn, *, seed: int) -> Outcome | Failure:
        """Return what the class's `score` says about an answer."""
        fields = {"task": wire.task_to_json(task), "turn": wire.turn_to_json(turn), "seed": seed}
        return await self._result(
            self._job(
                Kind.SCORE, fields, f"score() of task {task.id}", task, seed, lambda value: _outcome(value, "score()")
            )
        )

    async def score_group(
        self, task: Task, trajectories: Sequence[Trajectory], *, seed: int
    ) -> list[Outcome] | Failure:
        """Return what the class's `score_group` says about all trajectories of a task, in their order."""
        count = len(trajectories)
        fields = {
            "task": wire.task_to_json(task),
            "trajectories": list(map(wire.trajectory_to_json, trajectories)),
            "seed": seed,
        }

        def decode(values: Any) -> list[Outcome]:
            if not isinstance(values, list) or len(values) != count:
                raise InvalidReply(f"score_group() gave no list of {count} outcomes")
            return [_outcome(value, "score_group()") for value in values]

        return await self._result(self._job(Kind.GROUP, fields, f"score_group() of task {task.id}", task, seed, decode))

    async def run(self, task: Task, converse: Callable[[], Say], *, seed: int) -> Outcome | Failure:
        """Hold one conversation about a task and return its outcome.

        converse: makes the policy's side of a new conversation. It is called once more when the conversation has to
        start again, unless the class is deterministic. A ValueError of the policy's side goes to the environment; any
        other exception leaves this method as it is.
        """
        number, kind, payload = self._next(Kind.RUN, {"task": wire.task_to_json(task), "seed": seed})
        job = ConversationJob(
            number,
            kind,
            payload,
            f"run() of task {task.id}",
            task,
            seed,
            lambda value: _outcome(value, "run()"),
            converse=converse,
            deterministic=self._described().deterministic,
        )
        return await self._result(job)

    def _described(self) -> Description:
        if self._description is None:
            raise RuntimeError("the environment pool was not started; await start() first")
        return self._description

    # ---- jobs ----

    def _next(self, kind: Kind, fields: dict[str, Any]) -> tuple[int, Kind, bytes]:
        self._jobs += 1
        return self._jobs, kind, wire.encode(fields)

    def _job(
        self,
        kind: Kind,
        fields: dict[str, Any],
        what: str,
        task: Task | None,
        seed: int,
        decode: Callable[[Any], Any],
    ) -> Job:
        return Job(*self._next(kind, fields), what, task, seed, decode)

    async def _result(self, job: Job) -> Any:
        try:
            self._submit(job)
            return await job.future
        finally:
            self._release(job)

    def _submit(self, job: Job) -> None:
        self._described()
        if self._ended is not None:
            raise EnvironmentFailed(self._ended)
        (self._waiting_runs if job.kind == Kind.RUN else self._waiting_calls).append(job)
        self._dispatch()

    def _release(self, job: Job) -> None:
        """Forget a job whose caller has gone or has its result; a worker that still has it is asked to end it."""
        unfinished = not job.future.done()
        job.release()
        if unfinished:
            job.future.cancel()  # where it waits for a worker, `_dispatch` skips it
        if unfinished or job.kind == Kind.RUN:
            for slot in self._slots:
                if slot.job(job.id) is job and slot.process is not None:
                    slot.process.send(Kind.CANCEL, job.id, b"")

    def _dispatch(self) -> None:
        """Give the waiting jobs to the workers, in their order."""
        ahead = 1 + min(QUEUE_LIMIT - 1, int(QUEUE_S / self._call_s))
        usable = [slot for slot in self._slots if slot.usable and slot.doom is None and not slot.retiring]
        while self._waiting_calls and usable:
            slot = min(usable, key=lambda slot: len(slot.calls))
            if len(slot.calls) >= ahead:
                break
            self._give(slot, self._waiting_calls.popleft())
        while self._waiting_runs and usable:
            job = self._waiting_runs[0]
            slot = min(usable, key=lambda slot: len(slot.runs))
            room = min(self._config.concurrent, job.room, *(other.room for other in slot.runs.values()))
            if len(slot.runs) >= room:
                break
            self._give(slot, self._waiting_runs.popleft())

    def _give(self, slot: _Slot, job: Job) -> None:
        if job.future.done():  # its caller has gone
            return
        assert slot.process is not None
        slot.place_of(job)[job.id] = job
        job.begin(slot.process.send)
        slot.process.send(job.kind, job.id, job.payload)

    # ---- frames ----

    def _check(self, slot: _Slot, kind: int, number: int, length: int) -> None:
        """Refuse a frame by its header."""
        job = slot.job(number)
        if kind in (Kind.READY, Kind.REFUSED, Kind.FAILED) and length <= wire.ERROR_BYTES:
            return
        if kind not in (Kind.DONE, Kind.SAY):
            raise FrameRefused(number, "invalid", "its process wrote something else than replies into the reply pipe")
        output = length if job is None else job.output + length
        if job is not None:
            job.output = output
        if output > self._config.output_kib * 1024:
            raise FrameRefused(
                number,
                "output",
                f"its output is {output / 1024:.0f} KiB, above output_kib = {self._config.output_kib}; write less, or "
                "raise output_kib",
            )

    def _refused(self, slot: _Slot, refused: FrameRefused) -> None:
        kind: FailureKind = "output" if refused.kind == "output" else "invalid"
        self._doom(slot, refused.job, kind, str(refused))

    def _received(self, slot: _Slot, kind: int, number: int, payload: bytes) -> None:
        if kind in (Kind.READY, Kind.REFUSED):
            self._started(slot, kind, payload)
            return
        job = slot.job(number)
        if job is None or (slot.doom is not None and slot.doom.job == number):  # its time was up before
            return
        try:
            if kind == Kind.SAY:
                if isinstance(job, ConversationJob) and not job.future.done():
                    job.said(payload)
                return
            del slot.place_of(job)[number]
            reply = json.loads(payload)
            if kind == Kind.FAILED:
                slot.retiring |= bool(reply["stuck"])  # no thread can be ended, so its process has to
                self._fail(job, reply["kind"], reply["message"], reply["traceback"])
            else:
                if job.kind != Kind.RUN:
                    self._call_s *= 1.1 if float(reply["seconds"]) > self._call_s else 1 / 1.1
                result = job.decode(reply["result"])
                if not job.future.done():
                    job.future.set_result(result)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # InvalidReply, or no JSON of ours
            self._fail(job, "invalid", str(error), "")
        self._dispatch()

    def _started(self, slot: _Slot, kind: int, payload: bytes) -> None:
        if slot.ready is None or slot.ready.done():
            return
        fields = json.loads(payload)
        if kind == Kind.READY:
            slot.ready.set_result(fields)
        else:
            slot.ready.set_exception(PluginError(fields["message"]))

    # ---- failures ----

    def _fail(self, job: Job, kind: FailureKind, message: str, trace: str) -> None:
        """Make a failure the result of a job, count it and write it down, unless the job's caller has gone."""
        if job.future.done():
            return
        failure = Failure(kind, f"environment {self._config.name!r}: {job.what} failed ({kind}): {message}", trace)
        self._counts["failures"] += 1
        self._counts[f"failures/{kind}"] += 1
        if self._folder is not None:
            task = None if job.task is None else wire.task_to_json(job.task)
            line = {"call": job.what, "task": task, "seed": job.seed, **asdict(failure)}
            with (self._folder / f"{self._prefix}.failures.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        job.future.set_result(failure)

    def _doom(self, slot: _Slot, job: int, kind: FailureKind, message: str) -> None:
        """End a worker because of a job (0: which one is unknown), after a moment in which it writes where it is."""
        if slot.doom is not None or slot.process is None:
            return
        slot.doom = _Doom(job, kind, message)
        slot.process.ask_where()
        asyncio.get_running_loop().call_later(TRACEBACK_S, slot.process.kill)

    async def _watch(self) -> None:
        """Look after the workers for as long as the pool lives."""
        last, ticks = monotonic_ns(), 0
        while True:
            await asyncio.sleep(TICK_S)
            now = monotonic_ns()
            if now - last > 1e9:
                self._resumed_at = now
            last, ticks = now, ticks + 1
            try:
                for slot in self._slots:
                    self._look_after(slot, now, memory=ticks % MEMORY_TICKS == 0)
            except Exception as error:
                self._end(f"environment {self._config.name!r}: the watch over its workers failed: {error!r}")
                raise

    def _look_after(self, slot: _Slot, now: int, *, memory: bool) -> None:
        process = slot.process
        if process is None:
            return
        process.read_output()
        if process.exit_code() is not None:
            self._bury(slot, process)
            return
        if slot.doom is not None or not slot.usable:
            return
        if slot.retiring and not slot.calls and not slot.runs:
            process.kill()
            return
        deadline_s = self._config.deadline_s
        holder = process.page.holder()
        if holder is not None:
            job, since, before = holder
            if before + now - max(since, self._resumed_at) > deadline_s * 1e9:
                self._doom(slot, job, "deadline", f"it held its worker longer than deadline_s = {deadline_s:g} s")
        elif slot.calls or slot.runs:
            heard = max(process.page.last_beat(), slot.ready_at, self._resumed_at)
            if now - heard > (deadline_s + 1) * 1e9:  # a callback or a thread that keeps the interpreter
                self._doom(slot, 0, "deadline", f"its worker did not respond for deadline_s = {deadline_s:g} s")
        bound = int(self._config.memory_gib * 2**30)
        if memory and process.memory(bound) > bound:
            message = (
                f"its worker and the processes started there use more than memory_gib = {self._config.memory_gib:g}; "
                "use less memory, lower `concurrent`, or raise memory_gib"
            )
            self._doom(slot, holder[0] if holder else 0, "memory", message)

    def _bury(self, slot: _Slot, process: WorkerProcess) -> None:
        """Deal with the end of a process: find who caused it, restart the others, start the next process."""
        process.read_rest()
        process.read_output()
        holder = process.page.holder()
        trace = process.page.traceback()
        code = process.exit_code()
        assert code is not None
        last = process.last_output()
        doom = slot.doom or _Doom(
            holder[0] if holder else 0,
            "died",
            f"its worker process {describe_exit(code)}" + (f"; its last output:\n{last}" if last else ""),
        )
        process.release()
        slot.process = None
        if slot.ready is not None:
            if not slot.ready.done():
                slot.ready.set_exception(
                    PluginError(
                        f"environment {self._config.name!r}: the worker {describe_exit(code)} before it was ready; its "
                        f"last output:\n{last or '(nothing)'}"
                    )
                )
            return
        if not slot.usable:
            return
        slot.usable = False
        self._counts["worker_deaths"] += 1
        self._reassign(slot, doom, trace)
        slot.doom = None
        if self._ended is None:
            start = asyncio.get_running_loop().create_task(self._restart_worker(slot))
            self._starts.add(start)
            start.add_done_callback(self._starts.discard)
            self._dispatch()

    def _reassign(self, slot: _Slot, doom: _Doom, trace: str) -> None:
        """Fail the job that ended the worker, and let the others wait for another one."""
        calls = [job for job in slot.calls.values() if not job.future.done()]
        runs = [job for job in slot.runs.values() if not job.future.done()]
        slot.calls, slot.runs = {}, {}
        known = any(job.id == doom.job for job in (*calls, *runs))
        alone = len(calls) + len(runs) == 1
        for job in (*reversed(calls), *runs):
            if not known:
                job.crashes += 1
            at_fault = job.id == doom.job
            if not known and alone:
                at_fault = not job.waiting_for_policy or job.crashes >= CRASHES
            elif not known and job.kind != Kind.RUN:
                at_fault = job.crashes >= CRASHES
            if at_fault:
                self._fail(job, doom.kind, doom.message, trace)
                continue
            job.restart()
            if job.kind == Kind.RUN:
                self._counts["restarted"] += 1
                job.room = max(1, len(runs) // 4)
                self._waiting_runs.append(job)
            else:
                self._waiting_calls.appendleft(job)


def _outcome(fields: Any, method: str) -> Outcome:
    """Return the outcome with these fields. Raises InvalidReply."""
    if not isinstance(fields, dict) or set(fields) != {"reward", "rewards", "correct", "metrics"}:
        raise InvalidReply(f"the reply to {method} is no Outcome")
    return wire.checked_outcome(Outcome(**fields), method, bare=False)


def describe(config: EnvironmentConfig) -> Description:
    """Start one worker, return what the environment offers, and end the worker. Raises plugins.PluginError."""

    async def ask() -> Description:
        pool = EnvironmentPool(config.model_copy(update={"workers": 1}), folder=None)
        try:
            return await pool.start()
        finally:
            await pool.close()

    return asyncio.run(ask())
