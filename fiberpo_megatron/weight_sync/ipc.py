"""This module publishes to engines on the trainer's own machines and devices, through memory that both share.

Nothing is gathered on one rank and no file is written. Each rank writes the tensors of its share into a flat buffer. In
host memory an engine reads the buffers of all ranks. On GPUs the ranks broadcast their buffers to each other first, a
round at a time, so that an engine finds a whole round on its own GPU, in the buffer of the rank beside it.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.engines.errors import EngineRefused
from fiberpo_megatron.weight_sync.base import Deadline, PublisherContext
from fiberpo_megatron.weight_sync.rounds import Round, RoundPublisher
from fiberpo_megatron.weight_sync.session import end_quietly, open_update
from fiberpo_megatron.weight_sync.shared_memory import SharedBuffer

MIB = 1024**2
MAGIC = b"fiberpo-weights-1\n"
"""Every description begins with this (engines/sglang_plugin/path/fiberpo_weights.py)."""


class IpcPublisher(RoundPublisher):
    """Publishes to colocated engines through two flat buffers that take turns: CUDA IPC, or shared host memory.

    `bucket_mib` is about the size of a round, all ranks together, in MiB; a rank holds two buffers of it on a GPU, or
    two of its own share of it in host memory, for the whole run. The engines must run on the machines of the training
    ranks, as the same user, and must have been started by this package (`rollout.engine`, or `fiberpo engine`), whose
    plugin reads the buffers.

    On a GPU the buffers are kept because torch takes back memory that it has shared only when it was opened exactly as
    often as it was shared. Engines open a buffer as often as a publication needs, and an engine that fails never does.
    What was opened twice, or never, was seen to stay allocated until the process ends. In host memory the kernel would
    have to clear every page again.
    """

    pauses_beside = True

    def __init__(self, context: PublisherContext, bucket_mib: int = 256) -> None:
        if bucket_mib < 1:
            raise ValueError(f"bucket_mib = {bucket_mib} must be at least 1")
        super().__init__(context, bucket_mib * MIB)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._slots: list[SharedBuffer] = []
        self._handles: list[list[dict[str, Any]]] = []
        self._asked = False
        self._sizes: list[int] = []
        self._described: Sequence[Round] = ()
        self._tensors: dict[int, list[Any]] = {}
        """Where the tensors of each round of `_described` lie."""

    def begin(self, plan: Sequence[Round], version: str, deadline: Deadline) -> None:
        """Allocate the two buffers, unless they are there from the publication before."""
        if plan is not self._described:
            self._described, self._tensors = plan, {}
        elif self._slots:
            return
        sizes = [
            sum(one.padded_bytes for one in this.buckets)
            if self.device is not None
            else this.buckets[self.context.rank].padded_bytes
            for this in plan
        ]
        device = self.device or torch.device("cpu")
        self._free()
        self._slots = [SharedBuffer(max(sizes[i::2], default=0), device) for i in range(min(2, len(plan)))]

    def engines_changed(self) -> None:
        """Ask the engines once more whether they can open the buffers."""
        self._asked = False

    def exchange(self, plan: Sequence[Round], deadline: Deadline) -> None:
        """Tell rank 0 where the buffers are; it asks the engines, before the first publication, to open them."""
        mine = [slot.handle for slot in self._slots]
        self._handles = self.ranks.gather(mine, "exchanging the handles of shared memory", deadline)
        if not self._asked:
            with self.ranks.step("asking the engines to open shared memory", deadline):
                if self.leads:
                    self._sizes = self.engines.on_all(lambda client: self._ask(client, plan[0], deadline))
            self._asked = True

    def prepare(self, this: Round, tensors: list[tuple[str, Tensor]], version: str, deadline: Deadline) -> None:
        """Write this rank's share into the round's buffer; on GPUs get the other ranks' shares too."""
        flat, own = self._slots[this.number % 2].bytes, this.buckets[self.context.rank]
        if self.device is None:
            own.fill(flat, tensors)
            return
        try:
            begin = sum(other.padded_bytes for other in this.buckets[: self.context.rank])
            own.fill(flat[begin : begin + own.padded_bytes], tensors)
        finally:
            # After a failure as well: the others have no way out of NCCL. `Ranks.step` says to them that it failed.
            self._share(this)

    def not_prepared(self, this: Round) -> None:
        """Take part in the broadcasts of the other ranks on GPUs."""
        if self.device is not None:
            self._share(this)

    def _share(self, this: Round) -> None:
        """Have every rank's part of the round in the buffers of all ranks."""
        flat, begin, parts = self._slots[this.number % 2].bytes, 0, []
        for rank, other in enumerate(this.buckets):
            part = flat[begin : begin + other.padded_bytes]
            begin += other.padded_bytes
            if self.context.world_size > 1 and other.tensors:
                parts.append(dist.broadcast(part, rank, async_op=True))
        for work in parts:
            work.wait()
        torch.cuda.synchronize(self.device)

    async def pause(self, deadline: Deadline) -> None:
        """Pause the engines and open an update on each."""
        await super().pause(deadline)
        await open_update(self.engines, deadline)

    def send(self, this: Round, version: str, deadline: Deadline) -> "Future[None] | None":
        """Have every engine load the round."""
        if not self.leads:
            return None
        payload = self._payload(self._description(this))
        reported = this.version(version)

        async def load(client: EngineClient) -> None:
            size = self._sizes[self.engines.clients.index(client)]
            await client.update_weights_from_tensor([payload] * size, reported, deadline.left())

        return self.engines.begin_on_all(load)

    def finish(self, version: str, deadline: Deadline) -> None:
        """Close the update on every engine."""
        self.engines.on_all(lambda client: client.end_weight_update(deadline.left()))

    def give_up(self) -> None:
        """Close the update after a failure."""
        if self.leads:
            end_quietly(self.engines)

    def close(self) -> None:
        """Release the buffers and leave the ranks' group. A second call does nothing."""
        self._free()
        super().close()

    def _free(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots = []

    def _payload(self, description: dict[str, Any]) -> bytes:
        return MAGIC + json.dumps(description).encode()

    def _description(self, this: Round) -> dict[str, Any]:
        """Return where the tensors of a round lie: which buffer of which rank, and the offset in it."""
        slot = this.number % 2
        if this.number not in self._tensors:
            self._tensors[this.number] = self._places(this)
        of_ranks = [handles[slot] for handles in self._handles]
        # On GPUs the buffers of all ranks have the same contents, and an engine takes the one on its own GPU.
        buffers = [of_ranks] if self.device is not None else [[handle] for handle in of_ranks]
        keep = [handle["token"] for handles in self._handles for handle in handles]
        return {"buffers": buffers, "tensors": self._tensors[this.number], "keep": keep}

    def _places(self, this: Round) -> list[Any]:
        found: list[Any] = []
        begin = 0
        for rank, of_rank in enumerate(this.buckets):
            buffer = 0 if self.device is not None else rank
            entries = zip(of_rank.names, of_rank.dtypes, of_rank.shapes, of_rank.offsets, strict=True)
            found += [[name, dtype, shape, buffer, begin + offset] for name, dtype, shape, offset in entries]
            begin += of_rank.padded_bytes if self.device is not None else 0
        return found

    async def _ask(self, client: EngineClient, first: Round, deadline: Deadline) -> int:
        """Return an engine's tensor-parallel size. Raises EngineRefused when it cannot open the buffers."""
        size = await client.tensor_parallel_size(deadline.left())
        with suppress(EngineRefused):  # an update is open only if a trainer was killed
            await client.end_weight_update(deadline.left())
        question = self._payload({**self._description(first), "tensors": []})
        try:
            await client.update_weights_from_tensor([question] * size, None, deadline.left())
        except EngineRefused as error:
            raise EngineRefused(
                client.url,
                f'it cannot read memory that the trainer shares (weight_sync.method = "ipc"): {error.what}',
                "Let the run start its engines on the machines of the training ranks, or start them there with "
                "`fiberpo engine`; or choose another weight_sync.method",
                client.address.log,
            ) from error
        return size
