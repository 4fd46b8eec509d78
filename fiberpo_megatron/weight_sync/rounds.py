"""This module holds the base of the built-in publishers, which carry the weights in rounds.

In a round every rank contributes a few full tensors, its share. While the engines take one round, the ranks export the
next one, so that a publication takes as long as the slower of the two.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.engines.errors import EngineError, EngineTimeout
from fiberpo_megatron.interfaces import WeightSource
from fiberpo_megatron.weight_sync.base import Deadline, Publisher, PublisherContext
from fiberpo_megatron.weight_sync.buckets import Bucket, bucket
from fiberpo_megatron.weight_sync.manifest import Manifest
from fiberpo_megatron.weight_sync.ranks import Ranks
from fiberpo_megatron.weight_sync.session import QUICK_S
from fiberpo_megatron.weight_sync.waiting import GRACE_S, Sending

POLL_S = 0.2
"""How often a rank that waits for the engines looks whether another rank has failed."""
INCOMPLETE = "incomplete-"
"""An engine reports this and the version while it holds a part of a publication."""


@dataclass(frozen=True)
class Round:
    """Describes a round: the bucket that each rank contributes."""

    number: int
    last: bool
    buckets: Sequence[Bucket]

    def version(self, version: str) -> str | None:
        """Return the version that engines have to report after this round; None if it does not change."""
        if self.last:
            return version
        return f"{INCOMPLETE}{version}" if self.number == 0 else None


class RoundPublisher(Publisher):
    """Carries the weights in rounds of about `limit` bytes; subclasses say how a round travels.

    Rank 0 talks to the engines: it pauses them before the first round and lets them go on after the last, when each
    reports the version and all hold the same weights. When a publication fails in between, or the trainer is killed,
    an engine may hold a mixture of weights: it then reports "incomplete-<version>" and stays paused, so that nothing is
    sampled from it, until a publication succeeds.
    """

    pauses_beside = False
    """Whether the engines are paused while the ranks prepare the first round, and not after it: for a way whose rounds
    are prepared about as quickly as engines are paused."""

    def __init__(self, context: PublisherContext, limit: int) -> None:
        super().__init__(context)
        self.limit = limit
        self.ranks = Ranks(context.rank, context.world_size, context.timeout_s)
        self.leads = context.rank == 0
        self.sent = False
        """Whether the engines may have loaded something of the publication in progress."""
        self.checksums: list[str] = []
        """What each engine holds since the last publication (rank 0)."""
        self.seconds: dict[str, float] = {}
        """How long the parts of the last publication took."""
        self._manifest = Manifest(context.model) if self.leads else None
        self.plan: list[Round] = []
        self._known: list[EngineClient] = []
        """The engines of the last publication."""
        self._pausing: Future[None] | None = None
        """The engines' pause for this publication, once it has begun (rank 0)."""
        self._on_their_way: list[Future[None]] = []
        """Those rounds of this publication of which it is not known yet that the engines have loaded them."""

    def publish(self, source: WeightSource, version: str) -> None:
        """Load the weights into every engine as `version`; running requests go on with the new weights.

        Raises EngineError that names the engine, and ValueError for weights that are not the model's.
        """
        # Rank 0 gives up first: it alone hears from the engines, and knows which one is late.
        deadline = Deadline(self.context.timeout_s + (0.0 if self.leads else GRACE_S))
        self.ranks.begin()
        if self._known and self._known != self.engines.clients:
            self.engines_changed()
        self._known = self.engines.clients
        plan = self._planned(source, deadline)
        share = source.share(self.limit)
        before: Sending | None = None
        began = time.perf_counter()
        self._pausing, self.sent, self._on_their_way = None, False, []
        what = f"publishing weights {version}"
        try:
            with self.ranks.step(f"{what}: beginning", deadline):
                self.begin(plan, version, deadline)
            self.exchange(plan, deadline)
            for this in plan:
                with self.ranks.step(f"{what}: round {this.number + 1} of {len(plan)}", deadline):
                    try:
                        tensors = next(share, None)
                        if tensors is None:
                            raise ValueError(f"the policy announced {len(plan)} rounds, but exported {this.number}")
                    except BaseException:
                        self.not_prepared(this)
                        raise
                    pauses = self.leads and not this.number
                    if pauses and self.pauses_beside:
                        self._pausing = self.engines.submit(self.pause(deadline))
                    self.prepare(this, tensors, version, deadline)
                    if pauses and not self.pauses_beside:
                        self._pausing = self.engines.submit(self.pause(deadline))
                    self.wait_for(self._pausing if pauses else None, what, deadline)
                    self.wait_for(before.passed if before else None, what, deadline)
                sent = self.send(this, version, deadline)
                before = sent if isinstance(sent, Sending) else Sending(sent, sent)
                if before.loaded is not None:
                    self.sent = True
                    self._on_their_way.append(before.loaded)
            self.conclude(version, deadline)
            with self.ranks.step(f"{what}: loading", deadline):
                for loaded in list(self._on_their_way):
                    self.wait_for(loaded, what, deadline)
                self.seconds["carried"] = time.perf_counter() - began
                if self.leads:
                    self.finish(version, deadline)
                    self.check_version(version)
                    self.checksums = self.check_alike(deadline.left())
                    self.resume()
        except BaseException as error:
            self._abandon(error)
            raise
        finally:
            self.released()
            for _ in share:  # other ranks still need what this one holds
                pass
        self.seconds["all"] = time.perf_counter() - began

    def _planned(self, source: WeightSource, deadline: Deadline) -> list[Round]:
        """Return the rounds of a publication, which stay the same for a run; rank 0 checks them against the model."""
        if self.plan:
            return self.plan
        rounds = source.rounds(self.limit)
        with self.ranks.step("comparing the exported weights with the model's", deadline):
            if self._manifest is not None:
                self._manifest.check(tensor for of_ranks in rounds for mine in of_ranks for tensor in mine)
        last = len(rounds) - 1
        self.plan = [Round(i, i == last, [bucket(mine) for mine in of_ranks]) for i, of_ranks in enumerate(rounds)]
        return self.plan

    # What a way of carrying the weights consists of

    def engines_changed(self) -> None:  # noqa: B027 - optional
        """Forget what was agreed with the engines, because some have gone or come. Every rank calls it."""

    def begin(self, plan: Sequence[Round], version: str, deadline: Deadline) -> None:  # noqa: B027 - optional
        """Make what a publication needs, on every rank. The engines still generate."""

    def exchange(self, plan: Sequence[Round], deadline: Deadline) -> None:  # noqa: B027 - optional
        """Tell the other ranks of it. Every rank makes the same collective calls."""

    @abstractmethod
    def prepare(self, this: Round, tensors: list[tuple[str, Tensor]], version: str, deadline: Deadline) -> None:
        """Take this rank's share of a round, while the round before it travels.

        The round two before has passed, on every rank; where `send` says None for that, this method waits for it.
        """

    def not_prepared(self, this: Round) -> None:  # noqa: B027 - optional
        """Make the collective calls of `prepare` on a rank whose export failed, so that the others come to the end of
        theirs, and learn of it."""

    async def pause(self, deadline: Deadline) -> None:
        """Make the engines ready for the first round; rank 0 runs it on the pool's loop."""
        await self.engines.each(lambda client: client.pause("retract"))

    @abstractmethod
    def send(self, this: Round, version: str, deadline: Deadline) -> "Sending | Future[None] | None":
        """Begin to carry a round that every rank has prepared. The round before it has passed, on every rank.

        The future ends when the engines have loaded the round; only then is the next one sent. A `Sending` says apart
        when the next round may be sent. None stands for a rank that has nothing to wait for.
        """

    def conclude(self, version: str, deadline: Deadline) -> None:  # noqa: B027 - optional
        """Exchange what the ranks found out in all rounds. Every rank makes the same collective calls."""

    def finish(self, version: str, deadline: Deadline) -> None:  # noqa: B027 - optional
        """End the publication on the engines, before they generate again (rank 0)."""

    def give_up(self) -> None:  # noqa: B027 - optional
        """Undo what `exchange` and `pause` did, after a failure, on every rank. It must not raise."""

    def released(self) -> None:  # noqa: B027 - optional
        """Release what `begin` made, on every rank, also after a failure."""

    def resume(self) -> None:
        """Let the engines generate again (rank 0)."""
        self.engines.on_all(lambda client: client.resume())

    def _abandon(self, error: BaseException) -> None:
        for sent in self._on_their_way:
            sent.cancel()
        if self._pausing is not None:  # what it has begun on the engines is undone below
            self.engines.wait([self._pausing], QUICK_S)
            self._pausing.cancel()
        self.give_up()
        if self.sent:
            error.add_note("the engines may hold a mixture of weights; they stay paused until a publication succeeds")
        elif self._pausing is not None:
            with suppress(EngineError):  # the first error is the one to raise
                self.resume()

    def wait_for(self, work: "Future[None] | None", what: str, deadline: Deadline) -> None:
        """Wait until `work` is done, and meanwhile for a failure of any round that is on its way.

        Raises the error of the one that failed, EngineTimeout that names the engines which are late, or what
        `Ranks.failure` says.
        """
        if work is None:
            return None
        while True:
            self._on_their_way = [sent for sent in self._on_their_way if not sent.done() or sent.result()]
            if work.done():
                return work.result()
            if self.engines.wait([work, *self._on_their_way], min(POLL_S, deadline.left())):
                continue
            if (failure := self.ranks.failure(what)) is not None:
                raise failure
            if not deadline.passed():
                continue
            late = self.late()
            if not late and self.engines.wait([work, *self._on_their_way], POLL_S):
                continue  # a request has just run out of time itself, and says so
            late = late or self.engines.clients
            work.cancel()
            raise EngineTimeout(
                ", ".join(client.url for client in late),
                f"{what} was not complete in time",
                "Check the network between them, raise weight_sync.timeout_s, or use weight_sync.method = 'disk'",
                late[0].address.log,
            )

    def late(self) -> list[EngineClient]:
        """Return the engines for which this rank waits."""
        return [client for client in self.engines.clients if client.unanswered]

    def close(self) -> None:
        """Leave the ranks' group. A second call does nothing."""
        self.ranks.close()
