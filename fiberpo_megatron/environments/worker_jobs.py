"""This module holds the jobs of a worker: their clocks, their coroutines, and the policy in a conversation."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fiberpo_megatron.environments import Message, Turn, wire
from fiberpo_megatron.environments.wire import Kind

if TYPE_CHECKING:
    from fiberpo_megatron.environments.worker import Worker


class OutputExceeded(RuntimeError):
    """Is raised when a job wrote more than its bound."""


class Job:
    """Holds one call of a method, or one conversation."""

    def __init__(self, number: int, kind: Kind, payload: bytes) -> None:
        self.id = number
        self.kind = kind
        self.payload = payload
        self.seed = 0
        self.output = 0
        """Bytes sent to the trainer."""
        self.failure: tuple[str, str, str] | None = None
        """What it failed with before it ended: kind, message, traceback."""
        self.main: asyncio.Task[Any] | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.threads: set[Future[Any]] = set()
        """Calls in threads of the event loop's executor that have not ended."""
        self.expired_at: int | None = None
        self.abandoned = False
        self.random_state: tuple[Any, ...] | None = None
        self.sampling: Mapping[str, float] = {}
        self.replies: dict[int, asyncio.Future[Turn]] = {}
        """Requests of `say` that the policy has not answered, by number."""
        self.says = 0
        self.last_text = ""
        """Text of the policy's last turn."""
        self.branches = 0
        """Branches beside the first one."""
        # the clock: ns of own steps; ns of waiting before `_since`; since when it waits, and what was held until then
        self.steps = 0
        self._waited = 0
        self._since: int | None = None
        self._held = 0

    def resume(self, now: int, held: int) -> None:
        """Count the time from now on. `held`: ns that all jobs together have held the loop."""
        if self._since is None:
            self._since, self._held = now, held

    def pause(self, now: int, held: int) -> None:
        """Count no time until `resume`, except for own steps."""
        self._waited = self.used(now, held) - self.steps
        self._since = None

    @property
    def waiting(self) -> bool:
        """Return whether the time between steps counts."""
        return self._since is not None

    def used(self, now: int, held: int) -> int:
        """Return the ns that the environment has worked on this job."""
        waiting = 0 if self._since is None else now - self._since - (held - self._held)
        return self.steps + self._waited + max(0, waiting)


class Stepped(Coroutine[Any, Any, Any]):
    """Wraps a coroutine of user code, so that the worker is asked before and after its every step."""

    def __init__(self, inner: Coroutine[Any, Any, Any], job: Job, worker: Worker) -> None:
        self._inner = inner
        self._job = job
        self._worker = worker

    def send(self, value: Any) -> Any:
        self._refuse_abandoned()
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        self._refuse_abandoned()
        return self._step(self._inner.throw, *error)

    def _refuse_abandoned(self) -> None:
        if self._job.abandoned:
            self.close()
            raise asyncio.CancelledError

    def close(self) -> None:
        try:
            self._step(self._inner.close)
        except RuntimeError as error:  # "coroutine ignored GeneratorExit": it stays where it is, for ever
            print(f"an abandoned coroutine could not be closed: {error}", file=sys.stderr)

    def _step(self, method: Callable[..., Any], *arguments: Any) -> Any:
        outer = self._worker.enter(self._job)
        try:
            return method(*arguments)
        except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the event loop
            raise RuntimeError(f"the environment raised {type(error).__name__}: {error}") from error
        finally:
            self._worker.leave(self._job, outer)

    def __await__(self) -> Any:
        return (yield from self._inner.__await__())

    def __getattr__(self, name: str) -> Any:  # cr_frame, cr_await, ...: what debuggers and tracebacks ask for
        return getattr(self._inner, name)


class PolicyEnd:
    """This is the `Conversation` of one branch of a job: what `say` gets crosses the pipe to the trainer's sampler.

    branch: the number of the branch, 0 for the first. origin: the branch that it goes on from, and with how many turns.
    """

    def __init__(self, job: Job, worker: Worker, branch: int = 0, origin: tuple[int, int] = (0, 0)) -> None:
        self._job = job
        self._worker = worker
        self._branch = branch
        self._origin = origin
        self._turns = 0
        self._reply: asyncio.Future[Turn] | None = None

    @property
    def seed(self) -> int:
        """Return the job's seed."""
        return self._job.seed

    @property
    def sampling(self) -> Mapping[str, float]:
        """Return how the policy is sampled; see `Conversation.sampling`."""
        return self._job.sampling

    def fork(self, turns: int = 0) -> PolicyEnd:
        """Return another branch of the trajectory; see `Conversation.fork`."""
        if not 0 <= turns <= self._turns:
            raise ValueError(f"fork({turns}): this conversation has {self._turns} turns")
        self._job.branches += 1
        return PolicyEnd(self._job, self._worker, self._job.branches, (self._branch, turns))

    async def say(
        self,
        new: str | Message | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> Turn:
        """Send a request to the trainer and wait for the policy's turn; see `Conversation.say`."""
        job, worker = self._job, self._worker
        if self._reply is not None:
            state = "was cancelled" if self._reply.cancelled() else "has not been answered yet"
            raise RuntimeError(f"say() was called although an earlier call of this conversation {state}")
        if job.failure is not None or job.expired_at is not None or job.id not in worker.running:
            raise RuntimeError("say() was called in a conversation that has ended")
        request = {
            "number": job.says,
            "branch": self._branch,
            "origin": list(self._origin),
            "new": wire.checked_messages(new, "`new` of say()"),
            "tools": None if tools is None else wire.plain(list(tools), "`tools` of say()"),
            "max_tokens": _checked_max_tokens(max_tokens),
            "stop": _checked_stop(stop),
        }
        worker.send_output(job, Kind.SAY, wire.encode(request))
        number, job.says = job.says, job.says + 1
        reply = self._reply = job.replies[number] = asyncio.get_running_loop().create_future()
        worker.pause(job)
        try:
            turn = await reply
        except asyncio.CancelledError:
            job.replies.pop(number, None)
            if not job.replies:
                worker.resume(job)
            reply.cancel()  # it stays: the policy may be answering, so that nothing can be said after this
            raise
        except ValueError:
            self._reply = None
            raise
        self._reply = None
        self._turns += 1
        job.last_text = turn.text
        return turn


def _checked_max_tokens(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"max_tokens = {value!r} of say() must be a whole number of at least 1, or None")


def _checked_stop(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"stop = {value!r} of say() must be a list of strings that are not empty, or None")
    return list(value)
