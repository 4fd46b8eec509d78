"""This module publishes by broadcast from the training ranks to the engines (NCCL, gloo without a GPU).

Every rank that has a share of the weights (at least one for each pipeline stage and each shard of the experts) has
process groups of its own with the engines, and broadcasts its share from there. Rank 0 asks the engines to receive.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import accumulate
from urllib.parse import urlsplit

import torch
from torch import Tensor

from fiberpo_megatron.engines.addresses import local_address
from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.engines.errors import EngineError, EngineRefused, EngineUnreachable
from fiberpo_megatron.weight_sync.base import Deadline, PublisherContext
from fiberpo_megatron.weight_sync.group import UpdateGroup
from fiberpo_megatron.weight_sync.rounds import Round, RoundPublisher
from fiberpo_megatron.weight_sync.session import QUICK_S, open_update
from fiberpo_megatron.weight_sync.waiting import GRACE_S, Sending, all_of, both, in_thread, success_of, together

MIB = 1024**2


class DistributedPublisher(RoundPublisher):
    """Broadcasts flat buckets in process groups of its own, which are made at the first publication.

    `bucket_mib` is about the size of a round, all ranks together, in MiB. `backend` is "nccl" or "gloo"; by default
    nccl where torch sees a GPU, else gloo.

    A refusal before the first bucket leaves the old weights in place; after a failure in the middle the error says that
    the engines may hold a mixture. The groups are then given up; the next publication makes new ones.
    """

    pauses_beside = True

    def __init__(self, context: PublisherContext, bucket_mib: int = 256, backend: str | None = None) -> None:
        if bucket_mib < 1:
            raise ValueError(f"bucket_mib = {bucket_mib} must be at least 1")
        if backend not in (None, "nccl", "gloo"):
            raise ValueError(f'backend = "{backend}" must be "nccl" or "gloo"')
        super().__init__(context, bucket_mib * MIB)
        self.backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        self.device = torch.device("cuda" if self.backend == "nccl" else "cpu")
        self._one_group = self.backend == "nccl"
        """Whether all engines are in one group of a rank, and not each in a group of its own (`_parts`)."""
        self._groups: list[UpdateGroup] = []
        """This rank's groups; none when it has no share."""
        self._names: dict[int, list[str]] = {}
        """Names of the groups of all sources, by rank; empty when they have to be made."""
        self._members: list[EngineClient] = []
        """The engines that have joined the groups."""
        self._last: list[Future[None]] = []
        """What was begun last in each of this rank's groups: its making, or a broadcast."""
        self._receiving: set[asyncio.Task[None]] = set()
        """The rounds that the engines have not loaded yet (rank 0)."""
        self._asked: list[asyncio.Task[None]] = []
        """The last request for the engines of each group (rank 0)."""
        self._leaving: dict[int, list[Future[None]]] = {}
        """The broadcasts out of each buffer; one that fails stays open."""
        self._slots: list[Tensor] = []
        """Two buffers that take turns: one is sent while the next round is written into the other."""
        self._flat: Tensor | None = None
        """This rank's share of the round that was prepared last."""

    def begin(self, plan: Sequence[Round], version: str, deadline: Deadline) -> None:
        """Allocate the buffers, unless they are there from the publication before."""
        sizes = [this.buckets[self.context.rank].nbytes for this in plan]
        largest = [max(sizes[i::2], default=0) for i in range(min(2, len(plan)))]
        if [len(slot) for slot in self._slots] != largest:
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in largest]

    def engines_changed(self) -> None:
        """Have the next publication make new groups. A group with an engine that has gone cannot be left in order."""
        if self.leads and self._names:
            self.engines.run(self._leave(ends_update=False))
        self._names = {}
        self._close_groups()

    async def _leave(self, ends_update: bool) -> None:
        """Have those engines leave the groups that are still there, all at once, and close the update on each.

        An engine that does not answer is asked for nothing more. One that refuses has nothing to leave.
        """

        async def leave(client: EngineClient) -> None:
            with suppress(EngineError):
                for name in self._names_of(client):
                    with suppress(EngineRefused):
                        await client.destroy_weights_update_group(name, QUICK_S)
                if ends_update:
                    await client.end_weight_update(QUICK_S)

        for task in self._receiving:
            task.cancel()
        if self._receiving:
            await asyncio.wait(self._receiving, timeout=QUICK_S)
        await asyncio.gather(*map(leave, self.engines.clients))

    def _names_of(self, client: EngineClient) -> list[str]:
        """Return the names of the groups that an engine was asked to join."""
        return [
            name
            for of_rank in self._names.values()
            for part, name in zip(self._parts(), of_rank, strict=True)
            if any(self._members[i] is client for i in part)
        ]

    def exchange(self, plan: Sequence[Round], deadline: Deadline) -> None:
        """Make the groups of each rank that has a share, at the first publication."""
        if self._names:
            return
        self._members = self.engines.clients
        what = "making the process groups for weights"
        sizes: list[int] = []
        with self.ranks.step(what, deadline):
            if self.leads:
                sizes = self.engines.on_all(lambda client: client.tensor_parallel_size(deadline.left()))
        sizes = self.ranks.gather(sizes, what, deadline)[0]
        mine: list[dict[str, str | int]] = []
        with self.ranks.step(what, deadline):
            if any(this.buckets[self.context.rank].tensors for this in plan):
                hosts = [urlsplit(client.url).hostname or "" for client in self._members]
                host = local_address(hosts)
                for part in self._parts():
                    name, size = f"fiberpo-{uuid.uuid4().hex[:8]}", 1 + sum(sizes[i] for i in part)
                    self._groups.append(UpdateGroup(name, self.backend, host, size, self.context.timeout_s))
                mine = [{"name": group.name, "host": host, "port": group.port} for group in self._groups]
        groups = self.ranks.gather(mine, what, deadline)
        self._names = {rank: [group["name"] for group in of_rank] for rank, of_rank in enumerate(groups) if of_rank}
        with self.ranks.step(what, deadline):
            # each in a thread of its own: one waits for an engine that has died, the others must not
            self._last = [self._begin(number, group.connect) for number, group in enumerate(self._groups)]
            joined = self.engines.submit(self._join(groups, sizes, deadline)) if self.leads else None
            made = both(all_of(self._last), joined)
            self.wait_for(made, f"the groups of rank {self.context.rank} and {sum(sizes)} engine ranks", deadline)

    def _begin(self, number: int, work: Callable[[], None], before: "Future[None] | None" = None) -> "Future[None]":
        """Run `work` in one of this rank's groups, behind `before`, in a thread.

        The future has EngineUnreachable with the engines of the group when either fails.
        """
        members = [self._members[i] for i in self._parts()[number]]

        def run() -> None:
            if before is not None:
                before.result()
            try:
                work()
            except RuntimeError as error:
                raise EngineUnreachable(
                    ", ".join(client.url for client in members),
                    f"its group for weights broke off on rank {self.context.rank} ({error})",
                    "It died, or the network between them failed: see its log",
                    members[0].address.log,
                ) from error

        return in_thread(run)

    def late(self) -> list[EngineClient]:
        """Return the engines that have not answered, or else those of the groups in which this rank still waits."""
        waits = [part for part, last in zip(self._parts(), self._last) if not last.done()]
        return super().late() or [self._members[i] for part in waits for i in part]

    def _parts(self) -> list[range]:
        """Return the engines of each group of a rank, by their place in the pool.

        With NCCL all engines are in one group, and the bytes leave a rank once. With gloo, which serves machines
        without a GPU, each engine has a group: it goes on to the next round without waiting for slower ones.
        """
        count = len(self._members)
        return [range(count)] if self._one_group else [range(i, i + 1) for i in range(count)]

    async def _join(
        self, groups: Sequence[list[dict[str, str | int]]], sizes: Sequence[int], deadline: Deadline
    ) -> None:
        """Have every engine join the groups of every source, one source after the other."""
        for of_rank in filter(None, groups):
            calls = []
            for part, group in zip(self._parts(), of_rank, strict=True):
                offsets = list(accumulate((sizes[i] for i in part), initial=1))
                place = (str(group["host"]), int(group["port"]))
                for i, offset in zip(part, offsets):
                    described = (*place, offset, offsets[-1], str(group["name"]), self.backend, deadline.left())
                    calls.append(self._members[i].init_weights_update_group(*described))
            # An engine that came too late for the store would look for it until its own deadline, and do nothing else.
            await together(calls, GRACE_S)

    def prepare(self, this: Round, tensors: list[tuple[str, Tensor]], version: str, deadline: Deadline) -> None:
        """Put this rank's share of the round into a flat buffer, when the broadcasts out of it have ended."""
        for leaving in self._leaving.pop(this.number % 2, []):
            self.wait_for(leaving, f"publishing weights {version}", deadline)
        own = this.buckets[self.context.rank]
        self._flat = self._slots[this.number % 2][: own.nbytes]
        own.fill(self._flat, tensors)
        if self._flat.is_cuda:
            # The broadcast runs in another stream. Other streams are not waited for: the round before may fail there.
            torch.cuda.current_stream(self._flat.device).synchronize()

    async def pause(self, deadline: Deadline) -> None:
        """Pause the engines and open an update on each."""
        await super().pause(deadline)
        await open_update(self.engines, deadline)

    def send(self, this: Round, version: str, deadline: Deadline) -> Sending:
        """Broadcast this rank's bucket; rank 0 asks the engines to receive the buckets of all ranks, in rank order.

        The engines of a group are asked for a round when they have loaded the one before. A broadcast of NCCL would
        occupy the GPU while it waits for them, so the whole round waits.
        """
        flat, own = self._flat, []
        if flat is not None and len(flat):
            groups = enumerate(zip(self._groups, self._last, strict=True))
            own = [self._begin(number, partial(group.broadcast, flat), last) for number, (group, last) in groups]
            self._last = own
        received = self.engines.submit(self._receive(this, version, deadline)) if self.leads else None
        loaded = both(all_of(own), received)
        if self._one_group:
            return Sending(loaded, loaded)
        self._leaving[this.number % 2] = [success_of(one) for one in own]
        return Sending(None, loaded)

    async def _receive(self, this: Round, version: str, deadline: Deadline) -> None:
        before: Sequence[asyncio.Task[None] | None] = self._asked if this.number else [None] * len(self._parts())
        self._asked = [
            asyncio.ensure_future(self._ask(number, part, last, this, version, deadline))
            for number, (part, last) in enumerate(zip(self._parts(), before, strict=True))
        ]
        this_one = asyncio.current_task()
        assert this_one is not None, "it runs on the pool's event loop"
        self._receiving.add(this_one)
        this_one.add_done_callback(self._receiving.discard)
        await together(self._asked)

    async def _ask(
        self,
        group: int,
        part: Sequence[int],
        before: "asyncio.Task[None] | None",
        this: Round,
        version: str,
        deadline: Deadline,
    ) -> None:
        """Have the engines of a group receive the round, when they have loaded the one before."""
        if before is not None:
            await asyncio.shield(before)
        sources = [(rank, bucket) for rank, bucket in enumerate(this.buckets) if bucket.tensors]
        reported = this.version(version)
        for number, (rank, bucket) in enumerate(sources):
            now = number == (len(sources) - 1 if this.last else 0)
            await together(
                self._members[i].update_weights_from_distributed(
                    bucket.names,
                    bucket.dtypes,
                    bucket.shapes,
                    self._names[rank][group],
                    reported if now else None,
                    deadline.left(),
                )
                for i in part
            )

    def finish(self, version: str, deadline: Deadline) -> None:
        """Close the update on every engine."""
        self.engines.on_all(lambda client: client.end_weight_update(deadline.left()))

    def give_up(self) -> None:
        """Drop the groups after a failure: their state is unknown, and an update must not stay open."""
        self._close_groups()
        self._slots = []  # a broadcast that hangs may still read them
        if self.leads:
            self.engines.run(self._leave(ends_update=True))
        self._names = {}

    def released(self) -> None:
        """Release the buffers on a GPU. In host memory they stay: the kernel would have to clear every page again."""
        self._flat = None
        if self.device.type == "cuda":
            self._slots = []

    def _close_groups(self) -> None:
        for group in self._groups:
            group.close()
        self._groups, self._last, self._leaving = [], [], {}

    def close(self) -> None:
        """Leave the process groups. A second call does nothing."""
        self.engines_changed()
        super().close()
