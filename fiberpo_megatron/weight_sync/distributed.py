"""This module publishes by broadcast from the training ranks to the engines (NCCL, gloo without a GPU).

Every rank that has a share of the weights (at least one for each pipeline stage and each shard of the experts) has a
process group of its own with the engines, and broadcasts its share from there. Rank 0 asks the engines to receive.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from itertools import accumulate
from urllib.parse import urlsplit

import torch
from torch import Tensor

from fiberpo_megatron.engines.addresses import local_address
from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.weight_sync.base import Deadline, PublisherContext
from fiberpo_megatron.weight_sync.group import UpdateGroup
from fiberpo_megatron.weight_sync.rounds import Round, RoundPublisher
from fiberpo_megatron.weight_sync.session import QUICK_S, end_quietly, open_update, quietly
from fiberpo_megatron.weight_sync.waiting import both, in_thread, together

MIB = 1024**2


class DistributedPublisher(RoundPublisher):
    """Broadcasts flat buckets in process groups of its own, which are made at the first publication.

    `bucket_mib` is about the size of a round, all ranks together, in MiB. `backend` is "nccl" or "gloo"; by default
    nccl where torch sees a GPU, else gloo.

    A refusal before the first bucket leaves the old weights in place; after a failure in the middle the error says that
    the engines may hold a mixture. The groups are then given up; the next publication makes new ones.
    """

    def __init__(self, context: PublisherContext, bucket_mib: int = 256, backend: str | None = None) -> None:
        if bucket_mib < 1:
            raise ValueError(f"bucket_mib = {bucket_mib} must be at least 1")
        if backend not in (None, "nccl", "gloo"):
            raise ValueError(f'backend = "{backend}" must be "nccl" or "gloo"')
        super().__init__(context, bucket_mib * MIB)
        self.backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        self.device = torch.device("cuda" if self.backend == "nccl" else "cpu")
        self._group: UpdateGroup | None = None
        self._names: dict[int, str] = {}
        """Names of the groups of all sources, by rank; empty when they have to be made."""
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
        names, self._names = self._names, {}
        if self.leads:
            for name in names.values():
                quietly(self.engines, partial(_leave, name=name))
        if self._group is not None:
            self._group.close()
            self._group = None

    def exchange(self, plan: Sequence[Round], deadline: Deadline) -> None:
        """Make the groups at the first publication: one for each rank that has a share, with all engine ranks."""
        if self._names:
            return
        what = "making the process groups for weights"
        sizes: list[int] = []
        with self.ranks.step(what, deadline):
            if self.leads:
                sizes = self.engines.on_all(lambda client: client.tensor_parallel_size(deadline.left()))
        sizes = self.ranks.gather(sizes, what, deadline)[0]
        mine: dict[str, str | int] | None = None
        with self.ranks.step(what, deadline):
            if any(this.buckets[self.context.rank].tensors for this in plan):
                hosts = [urlsplit(client.url).hostname or "" for client in self.engines.clients]
                host, name = local_address(hosts), f"fiberpo-{uuid.uuid4().hex[:8]}"
                self._group = UpdateGroup(name, self.backend, host, 1 + sum(sizes), self.context.timeout_s)
                mine = {"name": name, "host": host, "port": self._group.port}
        groups = self.ranks.gather(mine, what, deadline)
        with self.ranks.step(what, deadline):
            own = None if self._group is None else in_thread(self._group.connect)
            joined = self.engines.submit(self._join(groups, sizes, deadline)) if self.leads else None
            self.await_sent(both(own, joined), f"the group of rank 0 and {sum(sizes)} engine ranks", deadline)
        self._names = {rank: group["name"] for rank, group in enumerate(groups) if group}

    async def _join(
        self, groups: Sequence[dict[str, str | int] | None], sizes: Sequence[int], deadline: Deadline
    ) -> None:
        """Have every engine join the group of every source, one source after the other."""
        offsets = list(accumulate(sizes, initial=1))
        for group in filter(None, groups):
            calls = [
                (
                    client.init_weights_update_group,
                    (str(group["host"]), int(group["port"]), offset, offsets[-1], str(group["name"]), self.backend),
                )
                for client, offset in zip(self.engines.clients, offsets)
            ]
            await together(call(*arguments, deadline.left()) for call, arguments in calls)

    def prepare(self, this: Round, tensors: list[tuple[str, Tensor]], version: str, deadline: Deadline) -> None:
        """Put this rank's share of the round into one flat tensor."""
        own = this.buckets[self.context.rank]
        self._flat = self._slots[this.number % 2][: own.nbytes]
        own.fill(self._flat, tensors)
        if self._flat.is_cuda:
            # The broadcast runs in another stream. Other streams are not waited for: the round before may fail there.
            torch.cuda.current_stream(self._flat.device).synchronize()

    def pause(self, deadline: Deadline) -> None:
        """Pause the engines and open an update on each."""
        super().pause(deadline)
        open_update(self.engines, deadline)

    def send(self, this: Round, version: str, deadline: Deadline) -> "Future[None] | None":
        """Broadcast this rank's bucket; rank 0 asks the engines to receive the buckets of all ranks, in rank order."""
        flat, group = self._flat, self._group
        own = None
        if group is not None and flat is not None and len(flat):
            own = in_thread(lambda: group.broadcast(flat))
        received = self.engines.submit(self._receive(this, version, deadline)) if self.leads else None
        return both(own, received)

    async def _receive(self, this: Round, version: str, deadline: Deadline) -> None:
        sources = [(rank, bucket) for rank, bucket in enumerate(this.buckets) if bucket.tensors]
        reported = this.version(version)
        for number, (rank, bucket) in enumerate(sources):
            now = number == (len(sources) - 1 if this.last else 0)
            await together(
                client.update_weights_from_distributed(
                    bucket.names,
                    bucket.dtypes,
                    bucket.shapes,
                    self._names[rank],
                    reported if now else None,
                    deadline.left(),
                )
                for client in self.engines.clients
            )

    def finish(self, version: str, deadline: Deadline) -> None:
        """Close the update on every engine."""
        self.engines.on_all(lambda client: client.end_weight_update(deadline.left()))

    def give_up(self) -> None:
        """Drop the groups after a failure: their state is unknown, and an update must not stay open."""
        if self._group is not None:
            self._group.close()
        self._group, self._names = None, {}
        self._slots = []  # a broadcast that hangs may still read them
        if self.leads:
            end_quietly(self.engines)

    def released(self) -> None:
        """Release the buffers on a GPU. In host memory they stay: the kernel would have to clear every page again."""
        self._flat = None
        if self.device.type == "cuda":
            self._slots = []

    def close(self) -> None:
        """Leave the process groups. A second call does nothing."""
        self.engines_changed()
        super().close()


async def _leave(client: EngineClient, name: str) -> None:
    await client.destroy_weights_update_group(name, QUICK_S)
