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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic_ns
from typing import Any

from fiberpo_megatron.environments import Outcome, Split, Task, Trajectory, Turn, wire
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.failure_log import FailureLog
from fiberpo_megatron.environments.jobs import BudgetedJobs, ConversationJob, Job, Say
from fiberpo_megatron.environments.process import WorkerLog, end_in_order, interpreter
from fiberpo_megatron.environments.requests import (
    Request,
    group_request,
    run_request,
    score_request,
    task_request,
    worker_settings,
)
from fiberpo_megatron.environments.results import Description, EnvironmentFailed, Failure, FailureKind
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.environments.slots import TICK_S, Doom, Slot
from fiberpo_megatron.environments.wire import Kind
from fiberpo_megatron.plugins import PluginError
from fiberpo_megatron.printable import printable

MEMORY_TICKS = 5
"""Ticks between two looks at the memory of the workers."""
CLOSE_S = 2.0
"""How long a worker may take to end when it is asked to; then it is killed."""
START_ATTEMPTS = 3
"""How often a worker is started again during a run before the run ends."""
CRASHES = 3
"""A job fails after so many crashes whose cause is unknown; a conversation only when it was alone in the last one."""
QUEUE_S = 0.02
QUEUE_LIMIT = 32
"""Calls are sent to a worker ahead of their turn up to this time and number, so that it never waits for the trainer."""
LATE_S = 0.25
"""Calls that were sent ahead are given to other workers when the one before them takes longer than this. A budget's
part of a call is never shorter, because a busy machine may stop a quick call for a moment."""
WARM_UP = 2.0
"""Times that the first call in a new process may take of the longest first call so far, whatever its part is: it may
load what it needs, and would be cut again and again in one new process after the other."""


class EnvironmentPool:
    """Runs the worker processes of one environment. Call all coroutines on one event loop, that of `start`.

    folder: gets the workers' output and the failures; None keeps no files.
    rank: appears in the files' names.
    """

    def __init__(self, config: EnvironmentConfig, *, folder: Path | None, rank: int = 0) -> None:
        self._config = config
        self._folder = folder
        self._prefix = f"{config.name}_rank{rank:05d}"
        self._failures = FailureLog(folder and folder / f"{self._prefix}.failures.jsonl")
        self._slots: list[Slot] = []
        self._waiting_calls: deque[Job] = deque()
        self._waiting_runs: deque[Job] = deque()
        self._counts: Counter[str] = Counter()
        self._budgeted = BudgetedJobs()
        self._jobs = 0
        self._call_s = 2 * QUEUE_S
        """Running median of the time that a call takes in a worker; a mean would follow a busy machine's pauses."""
        self._first_s: dict[Kind, float] = {}
        """The longest time that a process has taken for its first call of a kind."""
        self._description: Description | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._starts: set[asyncio.Task[None]] = set()
        self._ended: str | None = None
        """Why the pool takes no more jobs."""

    # ---- life ----

    async def start(self) -> Description:
        """Start the workers and return what the environment offers.

        Raises plugins.PluginError with the cause and the fix when the class, its options, its version or its
        interpreter cannot be used, or when a worker is not ready in `start_timeout_s`.
        """
        if self._slots:
            raise RuntimeError("EnvironmentPool.start() was called a second time")
        python = interpreter(self._config.python, self._config.name)
        settings = worker_settings(self._config)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(self._config.workers):
            path = self._folder and self._folder / f"{self._prefix}_worker{number}.log"
            self._slots.append(Slot(self._config, python, settings, WorkerLog(path), self._received, self._died))
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        try:
            described = await asyncio.gather(*(slot.start() for slot in self._slots))
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

    async def _restart_worker(self, slot: Slot) -> None:
        """Start the next process of a slot; the pool ends when that keeps failing."""
        for attempt in range(START_ATTEMPTS):
            try:
                await slot.start()
            except PluginError as error:
                while slot.process is not None:  # `_watch` reaps it
                    await asyncio.sleep(TICK_S)
                if attempt == START_ATTEMPTS - 1:
                    self._end(f"environment {self._config.name!r} has lost a worker that does not start again: {error}")
            else:
                self._dispatch()
                return

    async def close(self) -> None:
        """End the workers and all that they started; for a moment they may end in good order."""
        self._end(f"the pool of environment {self._config.name!r} was closed")
        tasks = [*self._starts, *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        processes = [slot.process for slot in self._slots if slot.process is not None]
        await end_in_order(processes, CLOSE_S)
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
        """Return what was counted since the last call: `failures`, `failures/KIND`, `restarted` conversations,
        `worker_deaths`, and `cut_by_budget`, the failures for which a step's budget was spent."""
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

        jobs = [self._job(task_request(self._config.name, split, index)) for index in indices]
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

    async def score(
        self, task: Task, turn: Turn, *, seed: int, sample: int | None = None, budget: StepBudget | None = None
    ) -> Outcome | Failure:
        """Return what the class's `score` says about an answer.

        sample: which of the task's trajectories it is, for the record of a failure. budget: the time of its step.
        """
        return await self._result(self._job(score_request(task, turn, seed), sample, budget))

    async def score_group(
        self, task: Task, trajectories: Sequence[Trajectory], *, seed: int, budget: StepBudget | None = None
    ) -> list[Outcome] | Failure:
        """Return what the class's `score_group` says about all trajectories of a task, in their order."""
        return await self._result(self._job(group_request(task, trajectories, seed), None, budget))

    async def run(
        self,
        task: Task,
        converse: Callable[[], Say],
        *,
        seed: int,
        sample: int | None = None,
        budget: StepBudget | None = None,
        sampling: Mapping[str, float] | None = None,
    ) -> Outcome | Failure:
        """Hold one conversation about a task and return its outcome.

        sampling: what `Conversation.sampling` says.
        converse: makes the policy's side of a new conversation. It is called once more when the conversation has to
        start again, unless the class is deterministic. A ValueError of the policy's side goes to the environment; any
        other exception leaves this method as it is.
        """
        request = run_request(task, seed, sampling)
        deterministic = self._described().deterministic
        job = ConversationJob(self._number(), request, sample, budget, converse=converse, deterministic=deterministic)
        return await self._result(job)

    def _described(self) -> Description:
        if self._description is None:
            raise RuntimeError("the environment pool was not started; await start() first")
        return self._description

    # ---- jobs ----

    def _number(self) -> int:
        self._jobs += 1
        return self._jobs

    def _job(self, request: Request, sample: int | None = None, budget: StepBudget | None = None) -> Job:
        return Job(self._number(), request, sample, budget)

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
        if job.budget is not None:
            if job.budget.exhausted:
                self._cut(job)
                return
            self._budgeted.add(job)
        (self._waiting_runs if job.kind == Kind.RUN else self._waiting_calls).append(job)
        self._dispatch()

    def _release(self, job: Job) -> None:
        """Forget a job whose caller has gone or has its result; a worker that still has it is asked to end it."""
        unfinished = not job.future.done()
        if job.budget is not None:
            job.budget.end_call()
            self._budgeted.discard(job)
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
        usable = [slot for slot in self._slots if slot.takes_jobs]
        while self._waiting_calls and usable:
            slot = min(usable, key=lambda slot: ahead if slot.late else len(slot.calls))
            if len(slot.calls) >= (1 if slot.late else ahead):
                break
            self._give(slot, self._waiting_calls.popleft())
        while self._waiting_runs and usable:
            job = self._waiting_runs[0]
            slot = min(usable, key=lambda slot: len(slot.runs))
            room = min(self._config.concurrent, job.room, *(other.room for other in slot.runs.values()))
            if len(slot.runs) >= room:
                break
            self._give(slot, self._waiting_runs.popleft())

    def _give(self, slot: Slot, job: Job) -> None:
        if job.future.done():  # its caller has gone
            return
        assert slot.process is not None
        slot.place_of(job)[job.id] = job
        job.begin(slot.process.send)
        slot.process.send(job.kind, job.id, job.payload)

    def _take_back(self, slot: Slot, first: Job) -> None:
        """Give the calls that wait in a worker behind a slow one to others; only this worker's time is its to take."""
        slot.late = True
        behind = [job for job in slot.calls.values() if job is not first]
        for job in reversed(behind):
            del slot.calls[job.id]
            assert slot.process is not None
            slot.process.send(Kind.CANCEL, job.id, b"")
            job.id = self._number()  # what this worker still says about the old number is about nothing
            if not job.future.done():
                self._waiting_calls.appendleft(job)
        if behind:
            self._dispatch()

    # ---- frames ----

    def _received(self, slot: Slot, kind: int, number: int, payload: bytes) -> None:
        job = slot.job(number)
        if job is None:
            return
        try:
            if kind == Kind.SAY:
                if isinstance(job, ConversationJob) and not job.future.done():
                    job.said(payload)
                return
            del slot.place_of(job)[number]
            slot.late = False
            reply = json.loads(payload)
            if kind == Kind.FAILED:
                slot.retiring |= bool(reply["stuck"])  # no thread can be ended, so its process has to
                self._fail(job, reply["kind"], reply["message"], reply["traceback"])
            else:
                if job.kind != Kind.RUN:
                    self._call_s *= 1.1 if float(reply["seconds"]) > self._call_s else 1 / 1.1
                result = job.decode(reply["result"])
                if job.kind not in slot.served:
                    slot.served.add(job.kind)
                    self._first_s[job.kind] = max(self._first_s.get(job.kind, 0.0), float(reply["seconds"]))
                if not job.future.done():
                    job.future.set_result(result)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # InvalidReply, or no JSON of ours
            self._fail(job, "invalid", str(error), "")
        self._dispatch()

    # ---- failures ----

    def _fail(self, job: Job, kind: FailureKind, message: str, trace: str) -> None:
        """Make a failure the result of a job, count it and write it down, unless the job's caller has gone."""
        if job.future.done():
            return
        message = f"environment {self._config.name!r}: {job.what} failed ({kind}): {message}"
        failure = Failure(kind, printable(message, keep="\n"), printable(trace, keep="\n"))
        self._counts["failures"] += 1
        self._counts[f"failures/{kind}"] += 1
        task = None if job.task is None else wire.task_to_json(job.task)
        record = {"call": job.what, "task": task, "sample": job.sample, "seed": job.seed, **asdict(failure)}
        if not self._failures.write(record):
            self._counts["failures/not_written"] += 1
        job.future.set_result(failure)

    def _cut(self, job: Job) -> None:
        """Fail a job because the budget of its step does not reach for it."""
        assert job.budget is not None
        job.cut = True
        self._counts["cut_by_budget"] += 1
        slot = next((slot for slot in self._slots if slot.job(job.id) is job), None)
        message = job.budget.describe()
        if slot is None or not slot.stop(job, message):
            self._fail(job, "deadline", message, "")

    def _look_at_calls(self, now: int, seconds: float) -> None:
        """Look at slow calls: give others what waits behind them, and cut those for which the budgets do not reach."""
        first = [slot.first_call(now) for slot in self._slots]
        for slot, found in zip(self._slots, first):
            if found is not None and found[1] > LATE_S and slot.takes_jobs:
                self._take_back(slot, found[0])
        running = []
        for slot, found in zip(self._slots, first):
            if found is not None:
                job, taken_s = found
                cold_s = 0.0 if job.kind in slot.served else WARM_UP * self._first_s.get(job.kind, 0.0)
                running.append((job, taken_s, max(LATE_S, cold_s)))
        for job in self._budgeted.spend(seconds, running):
            self._cut(job)

    async def _watch(self) -> None:
        """Look after the workers for as long as the pool lives."""
        last, ticks = monotonic_ns(), 0
        resumed_at = 0  # when the trainer's event loop turned again after a pause in which it looked after no worker
        while True:
            await asyncio.sleep(TICK_S)
            now = monotonic_ns()
            if now - last > 1e9:
                resumed_at = now
            elapsed_s = min(1.0, (now - last) / 1e9)
            last, ticks = now, ticks + 1
            try:
                for slot in self._slots:
                    slot.look_after(now, resumed_at, memory=ticks % MEMORY_TICKS == 0)
                self._look_at_calls(now, elapsed_s)
            except Exception as error:
                self._end(f"environment {self._config.name!r}: the watch over its workers failed: {error!r}")
                raise

    def _died(self, slot: Slot, doom: Doom, trace: str) -> None:
        """Fail the job that ended a worker, let the others wait for another one, and start the next process."""
        self._counts["worker_deaths"] += 1
        self._reassign(slot, doom, trace)
        if self._ended is None:
            start = asyncio.get_running_loop().create_task(self._restart_worker(slot))
            self._starts.add(start)
            start.add_done_callback(self._starts.discard)
            self._dispatch()

    def _reassign(self, slot: Slot, doom: Doom, trace: str) -> None:
        """Fail the job that ended a worker, and let the others wait for another one."""
        calls = [job for job in slot.calls.values() if not job.future.done()]
        runs = [job for job in slot.runs.values() if not job.future.done()]
        known = slot.job(doom.job) is not None
        slot.calls, slot.runs = {}, {}
        alone = len(calls) + len(runs) == 1
        for job in (*reversed(calls), *runs):
            if not known:
                job.crashes += 1
            suspect = job.crashes >= CRASHES and (alone or job.kind != Kind.RUN)
            if job.id == doom.job or (not known and suspect):
                self._fail(job, doom.kind, doom.message, trace)
                continue
            job.restart()
            if job.kind == Kind.RUN:
                self._counts["restarted"] += 1
                job.room = max(1, len(runs) // 4)
                self._waiting_runs.append(job)
            else:
                self._waiting_calls.appendleft(job)


def describe(config: EnvironmentConfig) -> Description:
    """Start one worker, return what the environment offers, and end the worker. Raises plugins.PluginError."""

    async def ask() -> Description:
        pool = EnvironmentPool(config.model_copy(update={"workers": 1}), folder=None)
        try:
            return await pool.start()
        finally:
            await pool.close()

    return asyncio.run(ask())
