"""This is the worker process of an environment, which calls the methods of one instance for the trainer.

Everything runs in one asyncio event loop in the main thread. Jobs that call a method once (`train`, `held_out`,
`score`, `score_group`) run one after the other; conversations (`run`) share the loop. Every step of user code stands
between `_enter` and `_leave`, which write into the page shared with the trainer who holds the loop, and switch the
random state. So the trainer can see, from outside and at any time, whose code blocks this process.

Time is counted for each job: the steps that it holds the loop itself, and the time that it waits for something else
than the policy, without what other jobs hold the loop meanwhile.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic_ns
from typing import Any

from fiberpo_megatron.environments import Environment, Task, wire
from fiberpo_megatron.environments.methods import Methods
from fiberpo_megatron.environments.randomness import RandomStates
from fiberpo_megatron.environments.tracebacks import describe_error, trace_of, where
from fiberpo_megatron.environments.wire import InvalidReply, Kind
from fiberpo_megatron.environments.worker_jobs import Job, OutputExceeded, PolicyEnd, Stepped

TICK_S = 0.05
THREADS = 64
LONG_CALL_NS = 5_000_000
GRACE_NS = 1_000_000_000
"""How long a conversation may take to end after it was cancelled at its deadline."""

CURRENT: contextvars.ContextVar[Job] = contextvars.ContextVar("job")
"""The job on whose behalf the current asyncio task runs; tasks that user code makes inherit it."""


class Executor(ThreadPoolExecutor):
    """Runs what user code gives to threads (`asyncio.to_thread`), and knows for which job."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future = super().submit(function, *arguments, **named)
        job = CURRENT.get(None)
        if job is not None:
            job.threads.add(future)
            future.add_done_callback(job.threads.discard)
        return future


class Worker:
    """Serves the jobs that come through the command pipe until it is closed."""

    def __init__(
        self, environment: Environment, settings: Mapping[str, Any], page: wire.Page, commands: int, replies: int
    ) -> None:
        self._environment: Any = environment
        self._methods = Methods(environment, settings.get("format"))
        self._deadline_ns = int(settings["deadline_s"] * 1e9)
        self._deadline_s = settings["deadline_s"]
        self.output_limit = settings["output_kib"] * 1024
        self._page = page
        self._commands = commands
        self._replies = replies
        self._reader = wire.FrameReader()
        self._random = RandomStates()
        self._calls: deque[Job] = deque()
        self._busy: Job | None = None
        """A call that awaits something; the next one waits for its end."""
        self.running: dict[int, Job] = {}
        """Jobs with a coroutine."""
        self._held_ns = 0
        self._step_began = 0

    async def serve(self) -> None:
        """Serve jobs until the trainer closes the command pipe."""
        loop = asyncio.get_running_loop()
        self._end = loop.create_future()
        loop.set_task_factory(self._make_task)
        loop.set_default_executor(Executor(THREADS))
        loop.add_reader(self._commands, self._readable)
        self._tick()
        await self._end

    # ---- steps of user code ----

    def enter(self, job: Job) -> Job | None:
        """Begin a step of `job`; returns whose step this one is nested in."""
        outer = self._stepping
        if outer is not None:  # an eager task: the step of the outer job ends here and goes on afterwards
            self._end_step(outer)
        self._random.switch(job)
        self._begin_step(job)
        return outer

    def leave(self, job: Job, outer: Job | None) -> None:
        """End a step of `job`."""
        self._end_step(job)
        if outer is not None:
            self._random.switch(outer)
            self._begin_step(outer)

    _stepping: Job | None = None

    def _begin_step(self, job: Job) -> None:
        self._stepping = job
        now = self._step_began = monotonic_ns()
        self._page.hold(job.id, now, job.used(now, self._held_ns))

    def _end_step(self, job: Job) -> None:
        self._stepping = None
        step = monotonic_ns() - self._step_began
        job.steps += step
        self._held_ns += step
        self._page.hold(0, 0, 0)

    def pause(self, job: Job) -> None:
        """Stop counting: the job waits for the policy."""
        self._split_step()
        job.pause(monotonic_ns(), self._held_ns)

    def resume(self, job: Job) -> None:
        """Count the job's time again."""
        self._split_step()
        job.resume(monotonic_ns(), self._held_ns)

    def _split_step(self) -> None:
        """Count the running step up to now, so that a clock can be switched in its middle."""
        stepping = self._stepping
        if stepping is not None:
            self._end_step(stepping)
            self._begin_step(stepping)

    def _used(self, job: Job) -> int:
        """Return the ns that the environment has worked on a job, the running step included."""
        now = monotonic_ns()
        running = now - self._step_began if self._stepping is job and not job.waiting else 0
        return job.used(now, self._held_ns) + running

    def _make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        job = CURRENT.get(None)
        if job is None:
            return asyncio.Task(coroutine, loop=loop, **options)
        task: asyncio.Task[Any] = asyncio.Task(Stepped(coroutine, job, self), loop=loop, **options)
        job.tasks.add(task)
        task.add_done_callback(job.tasks.discard)
        return task

    # ---- frames ----

    def _readable(self) -> None:
        data = os.read(self._commands, wire.READ_BYTES)
        if not data:
            asyncio.get_running_loop().remove_reader(self._commands)
            self._end.set_result(None)
            return
        for kind, number, payload in self._reader.feed(data):
            if kind == Kind.TURN:
                self._answer(number, payload)
            elif kind == Kind.CANCEL:
                self._cancel(number)
            elif kind == Kind.RUN:
                self._run(Job(number, Kind.RUN, payload))
            else:
                self._calls.append(Job(number, Kind(kind), payload))
        self._next_call()

    def send(self, kind: Kind, number: int, payload: bytes) -> None:
        """Write one frame; waits while the pipe is full."""
        rest = memoryview(wire.frame(kind, number, payload))
        while rest:
            rest = rest[os.write(self._replies, rest) :]

    def send_output(self, job: Job, kind: Kind, payload: bytes) -> None:
        """Write a frame that counts as output of the job. Raises OutputExceeded beyond the bound."""
        job.output += len(payload)
        if job.output > self.output_limit:
            message = (
                f"its output is {job.output / 1024:.0f} KiB, above output_kib = {self.output_limit / 1024:g}; write "
                "less, or raise output_kib"
            )
            job.failure = ("output", message, "")
            raise OutputExceeded(message)
        self.send(kind, job.id, payload)

    def _send_failure(self, job: Job, kind: str, message: str, trace: str) -> None:
        threads = list(job.threads)
        for future in threads:
            future.cancel()  # those that have not begun; the others cannot be ended
        failure = {
            "kind": kind,
            "message": message[: wire.MESSAGE_CHARACTERS],
            "traceback": trace[-wire.TRACEBACK_CHARACTERS :],
            "stuck": any(future.running() for future in threads),
        }
        self.send(Kind.FAILED, job.id, wire.encode(failure))

    # ---- calls ----

    def _next_call(self) -> None:
        while self._calls and self._busy is None:
            began = monotonic_ns()
            self._call(self._calls.popleft())
            if monotonic_ns() - began > LONG_CALL_NS:  # see first whether the trainer still wants the next one
                asyncio.get_running_loop().call_later(0, self._next_call)
                return

    def _call(self, job: Job) -> None:
        function, arguments, finish = self._methods.bind(job)
        payload, error, value = b"", None, None
        outer = self.enter(job)
        try:
            value = function(*arguments)
            if not inspect.isawaitable(value):
                payload = self._result(job, value, finish)
        except BaseException as raised:  # user code raises what it likes, and sys.exit() ends no worker
            error = raised
        finally:
            self.leave(job, outer)
        if error is None and inspect.isawaitable(value):
            self._busy = job
            self._start(job, self._finish(job, value, finish))
        else:
            self._random.forget(job)
            self._report(job, payload, error)

    def _result(self, job: Job, value: Any, finish: Callable[[Any], Any]) -> bytes:
        result = finish(value)
        return wire.encode({"result": result, "seconds": self._used(job) / 1e9})

    async def _finish(self, job: Job, value: Awaitable[Any], finish: Callable[[Any], Any]) -> bytes:
        return self._result(job, await value, finish)

    # ---- coroutines ----

    def _run(self, job: Job) -> None:
        fields = json.loads(job.payload)
        job.payload = b""
        job.seed, job.sampling = fields["seed"], fields["sampling"]

        async def converse() -> bytes:
            value = self._environment.run(Task(**fields["task"]), PolicyEnd(job, self))
            if not inspect.isawaitable(value):
                raise InvalidReply(f"run() returned {wire.short(value)}; it must be an `async def`")
            return self._result(
                job, await value, lambda found: self._methods.outcome(found, "run()", job.last_text, bare=False)
            )

        self._start(job, converse())

    def _start(self, job: Job, coroutine: Coroutine[Any, Any, bytes]) -> None:
        self.running[job.id] = job
        self.resume(job)
        context = contextvars.copy_context()
        context.run(CURRENT.set, job)
        job.main = context.run(asyncio.get_running_loop().create_task, coroutine)
        job.main.add_done_callback(lambda task: self._ended(job, task))

    def _ended(self, job: Job, task: asyncio.Task[bytes]) -> None:
        """Report a coroutine that has ended, unless it was reported before."""
        if task.cancelled():
            error: BaseException | None = asyncio.CancelledError("the environment cancelled itself")
        else:
            error = task.exception()
        if job.id in self.running:
            self._report(job, b"" if error else task.result(), error)
            self._release(job)

    def _report(self, job: Job, payload: bytes, error: BaseException | None) -> None:
        """Send the result of a job, or why it has none."""
        if error is None:
            try:
                if job.failure is None and self._used(job) > self._deadline_ns:
                    job.failure = ("deadline", self._deadline_message(), "")
                if job.failure is None:
                    self.send_output(job, Kind.DONE, payload)
                    return
            except OutputExceeded:
                pass
            except Exception as raised:
                error = raised
        if job.failure is None:
            assert error is not None
            kind = "exception"
            if isinstance(error, MemoryError):
                kind = "memory"
            elif isinstance(error, InvalidReply):
                kind = "invalid"
            job.failure = (kind, describe_error(error), trace_of(error))
        self._send_failure(job, *job.failure)

    def _release(self, job: Job) -> None:
        """Forget a job, and end the tasks that it has left behind."""
        self.running.pop(job.id, None)
        self._random.forget(job)
        loop = asyncio.get_running_loop()
        if job.tasks:
            for task in list(job.tasks):
                task.cancel()
            loop.call_later(GRACE_NS / 1e9, self._drop, job)
        if self._busy is job:
            self._busy = None
            loop.call_soon(self._next_call)

    def _drop(self, job: Job) -> None:
        """Run no code of a job any more."""
        job.abandoned = True
        for task in list(job.tasks):
            task.cancel()

    def _deadline_message(self) -> str:
        return f"it worked longer than deadline_s = {self._deadline_s:g} s"

    def _tick(self) -> None:
        """Show that the loop turns, and end the jobs that wait beyond their deadline."""
        now = monotonic_ns()
        self._page.beat(now)
        for job in list(self.running.values()):
            used = job.used(now, self._held_ns)
            if job.expired_at is None:
                if used > self._deadline_ns:
                    self._expire(job, now)
            elif now - job.expired_at > GRACE_NS:
                self._abandon(job)
        asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _expire(self, job: Job, now: int) -> None:
        job.expired_at = now
        assert job.main is not None
        if job.failure is None:
            job.failure = ("deadline", self._deadline_message(), where(job.main))
        job.main.cancel()

    def _abandon(self, job: Job) -> None:
        """Report a job whose coroutine does not end, and never run it again."""
        assert job.failure is not None
        self._send_failure(job, *job.failure)
        self._drop(job)
        self._release(job)

    def _cancel(self, number: int) -> None:
        """End a job whose result the trainer does not want any more."""
        for job in self._calls:
            if job.id == number:
                self._calls.remove(job)
                self._send_failure(job, "exception", "cancelled by the trainer", "")
                return
        running = self.running.get(number)
        if running is not None and running.expired_at is None:
            running.failure = ("exception", "cancelled by the trainer", "")
            self._expire(running, monotonic_ns())

    def _answer(self, number: int, payload: bytes) -> None:
        """Hand a turn of the policy to the branch of a conversation that waits for it. The time of the conversation
        counts again once no branch waits."""
        job = self.running.get(number)
        fields = json.loads(payload)
        reply = None if job is None else job.replies.pop(fields["number"], None)
        if job is None or reply is None:
            return
        if not job.replies:
            self.resume(job)
        if reply.done():
            return
        if "error" in fields:
            reply.set_exception(ValueError(fields["error"]))
        else:
            reply.set_result(wire.turn_from_json(fields))
