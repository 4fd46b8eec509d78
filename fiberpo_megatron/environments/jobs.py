"""This module holds what a pool of workers is asked to do: calls of a method, and conversations."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from fiberpo_megatron.environments import Turn, wire
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.requests import Request
from fiberpo_megatron.environments.wire import InvalidReply, Kind


class BranchPoint(NamedTuple):
    """Says which branch of a trajectory is meant, and where it left another one (`Conversation.fork`)."""

    number: int
    """1 for the first branch beside the trajectory's own token sequence, which is 0."""
    parent: int
    """The branch that it goes on from."""
    turns: int
    """How many turns of that branch are its context; 0: it begins with a prompt of its own."""


FIRST = BranchPoint(0, 0, 0)
"""The trajectory's own token sequence, from which branches go on."""
Say = Callable[..., Awaitable[Turn]]
"""The policy of one conversation: (new, tools, max_tokens, stop) to the policy's turn, and (new, tools, max_tokens,
stop, BranchPoint) for a turn of a further branch. A ValueError that it raises goes to the environment, which asked for
something impossible; any other exception leaves `EnvironmentPool.run`."""
Send = Callable[[Kind, int, bytes], None]


class Job:
    """Holds one call of a method of the environment.

    future: becomes the decoded result, a Failure, or an exception that is not the environment's fault.
    sample: which of the task's trajectories it is about. budget: the time of the step that it belongs to.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        sample: int | None = None,
        budget: StepBudget | None = None,
    ) -> None:
        self.id = number
        self.kind = request.kind
        self.payload = wire.encode(request.fields)
        self.what = request.what
        self.task = request.task
        self.seed = request.seed
        self.decode = request.decode
        self.sample = sample
        self.budget = budget
        self.cut = False
        """Whether its step's budget has ended it."""
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.output = 0
        """Bytes that the worker has announced for it."""
        self.room = 1 << 30
        """How many conversations may share a worker with it, itself included; less after each crash."""
        self.crashes = 0
        """How many of its workers in a row have crashed for an unknown cause."""

    @property
    def works(self) -> bool:
        """Return whether the environment has to do something for it, or a worker to become free."""
        return not self.cut and not self.future.done()

    def begin(self, send: Send) -> None:
        """Note that a worker has got the job. `send` reaches that worker."""
        self.output = 0

    def restart(self) -> None:
        """Forget what a worker has begun, because another one will get the job."""

    def release(self) -> None:
        """End everything that was started for the job."""


class ConversationJob(Job):
    """Holds one conversation: `run` is in the worker, the policy is here.

    converse: makes the policy of a new conversation.
    deterministic: after a crash the recorded turns are used again; otherwise a new conversation begins.
    """

    def __init__(self, *arguments: Any, converse: Callable[[], Say], deterministic: bool) -> None:
        super().__init__(*arguments)
        self._converse = converse
        self._deterministic = deterministic
        self._say: Say | None = None
        self._record: list[tuple[dict[str, Any], asyncio.Task[Turn]]] = []
        self._asked = 0
        self._deliveries: set[asyncio.Task[None]] = set()
        self._send: Send | None = None
        self._awaited = 0
        """Turns that the policy samples: one of each branch at most."""

    @property
    def works(self) -> bool:
        """Return whether the environment has to do something for it: not while the policy samples."""
        return super().works and not self._awaited

    def begin(self, send: Send) -> None:
        super().begin(send)
        self._send = send
        self._asked = 0

    def restart(self) -> None:
        self._end_deliveries()
        if not self._deterministic:
            self._forget()

    def release(self) -> None:
        self._end_deliveries()
        self._forget()

    def _end_deliveries(self) -> None:
        self._send = None
        self._awaited = 0
        for delivery in self._deliveries:
            delivery.cancel()
        self._deliveries = set()

    def _forget(self) -> None:
        for _, answer in self._record:
            answer.cancel()
        self._record = []
        self._say = None

    def said(self, payload: bytes) -> None:
        """Take a request of `say`. Raises InvalidReply when a repeated conversation asks something else."""
        request = json.loads(payload)
        number, self._asked = self._asked, self._asked + 1
        if request.pop("number") != number:
            raise InvalidReply(f"say() number {number} was not the next one")
        if number < len(self._record):
            recorded, answer = self._record[number]
            if recorded != request:
                raise InvalidReply(
                    f"the class says `deterministic = True`, but after a restart its say() number {number + 1} asked "
                    f"{wire.short(request)} instead of {wire.short(recorded)}; set deterministic = False"
                )
        else:
            answer = asyncio.get_running_loop().create_task(self._ask(request))
            answer.add_done_callback(_retrieve)
            self._record.append((request, answer))
        self._awaited += 1
        delivery = asyncio.get_running_loop().create_task(self._deliver(number, answer))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _ask(self, request: dict[str, Any]) -> Turn:
        if self._say is None:
            self._say = self._converse()
        branch = BranchPoint(request["branch"], *request["origin"])
        further = (branch,) if branch.number else ()
        return await self._say(request["new"], request["tools"], request["max_tokens"], request["stop"], *further)

    async def _deliver(self, number: int, answer: asyncio.Task[Turn]) -> None:
        try:
            payload = wire.encode({"number": number, **wire.turn_to_json(await asyncio.shield(answer))})
        except ValueError as error:
            payload = wire.encode({"number": number, "error": str(error)})
        except asyncio.CancelledError:
            if answer.cancelled() and self._send is not None and not self.future.done():
                self.future.cancel()  # the policy's side was cancelled, and so is this
            raise
        except Exception as error:  # the policy failed, not the environment: the caller gets it unchanged
            if not self.future.done():
                self.future.set_exception(error)
            return
        if self._send is not None:
            self._awaited -= 1
            self._send(Kind.TURN, self.id, payload)


class BudgetedJobs:
    """Holds the jobs that have not ended, by the budget of their step."""

    def __init__(self) -> None:
        self._jobs: dict[StepBudget, set[Job]] = {}

    def add(self, job: Job) -> None:
        """Count the time of a job, which has a budget."""
        assert job.budget is not None
        self._jobs.setdefault(job.budget, set()).add(job)

    def discard(self, job: Job) -> None:
        """Forget a job that has ended."""
        assert job.budget is not None
        left = self._jobs.get(job.budget, set())
        left.discard(job)
        if not left:
            self._jobs.pop(job.budget, None)

    def spend(self, seconds: float, running: Sequence[tuple[Job, float, float]]) -> list[Job]:
        """Count time in which the environment has worked, and return the jobs that the budgets do not reach for.

        running: the calls that workers are busy with: each with the seconds that it has taken, and with the least
            number of seconds that it may take, whatever its part of the budget is.
        """
        found = []
        for budget, jobs in self._jobs.items():
            working = [job for job in jobs if job.works]
            if not working:
                continue
            budget.spend(seconds)
            part_s = budget.part_s
            if budget.exhausted:
                found += working
            elif part_s is not None:
                mine = [one for one in running if one[0].budget is budget and one[0].works]
                found += [job for job, taken_s, least_s in mine if taken_s > max(part_s, least_s)]
        return found


def _retrieve(answer: asyncio.Task[Turn]) -> None:
    """Look at the exception of an answer that may not be awaited any more, so that asyncio does not report it."""
    if not answer.cancelled():
        answer.exception()
