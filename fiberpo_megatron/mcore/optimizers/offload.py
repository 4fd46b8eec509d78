"""This module frees device memory between optimiser steps: gradients are dropped, the state moves to the host.

Parameters stay, because log-probs, exports and publications need them. Storages are emptied in place, so that every
tensor and view keeps its identity, Megatron's flat buffers and their shards included. (Megatron's own
`MegatronOptimizer.offload_to_cpu` gives tensors new storages instead: float32 masters that are views of the
parameters would then no longer be the parameters.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from fiberpo_megatron.mcore.optimizers.build import optimizer_parts


class TrainingMemory:
    """Manages what training keeps on the device besides the parameters: gradient buffers, and the optimizer's state
    (float32 master weights, and what the optimizer keeps for each parameter, such as Adam's moments).

    With `offload` the state is on the device only inside `state`.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, offload: bool = False
    ) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self._offload = offload
        self._parked: list[tuple[Tensor, Tensor]] = []
        self._pinned: dict[int, Tensor] = {}
        self.released = False
        if offload:
            self._park()

    @contextmanager
    def state(self, action: str) -> Iterator[None]:
        """Bring the optimizer's state to the device for the block. Raises RuntimeError while the memory is released."""
        self.require(action)
        self._unpark()
        yield
        if self._offload:
            self._park()

    def release(self) -> None:
        """Release the gradient buffers and move the optimizer's state to host memory. A second call changes nothing."""
        if self.released:
            return
        self._optimizer.zero_grad()  # the masters' .grad are views of the buffers
        for buffer in self._gradient_buffers():
            buffer.untyped_storage().resize_(0)
        self._park()
        self.released = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Bring the state back bit by bit, and the gradient buffers as zeros. A second call changes nothing."""
        if not self.released:
            return
        if not self._offload:
            self._unpark()
        for buffer in self._gradient_buffers():
            buffer.untyped_storage().resize_(buffer.nbytes)
            buffer.zero_()
        self.released = False

    def require(self, action: str) -> None:
        """Raise RuntimeError while the memory is released: `action` would read memory that does not exist."""
        if self.released:
            raise RuntimeError(
                f"{action} needs the optimizer's memory, which was released; call restore_memory() first"
            )

    def _park(self) -> None:
        """Move the optimizer's state to the host, unless it is there already."""
        if self._parked:
            return
        for tensor in self._state():
            storage = tensor.untyped_storage()
            copy = self._host_copy(storage)
            copy.untyped_storage().copy_(storage)
            storage.resize_(0)
            self._parked.append((tensor, copy))

    def _unpark(self) -> None:
        for tensor, copy in self._parked:
            storage = tensor.untyped_storage()
            storage.resize_(copy.nbytes)
            storage.copy_(copy.untyped_storage(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies are read until here
        self._parked = []

    def _host_copy(self, storage: torch.UntypedStorage) -> Tensor:
        """Return host memory for a storage. Pinned memory is kept: allocating it takes longer than copying."""
        if storage.device.type == "cpu":
            return torch.empty(storage.nbytes(), dtype=torch.uint8)
        copy = self._pinned.get(storage._cdata)
        if copy is None or copy.nbytes != storage.nbytes():
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
            self._pinned[storage._cdata] = copy
        return copy

    def device_bytes(self) -> int:
        """Return the bytes of gradient buffers and optimizer state that are allocated on the device now."""
        tensors = [*self._gradient_buffers(), *self._state()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def host_bytes(self) -> int:
        """Return the bytes of the optimizer's state that wait in host memory now."""
        return sum(copy.nbytes for _, copy in self._parked)

    def _gradient_buffers(self) -> Iterator[Tensor]:
        for chunk in self._chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                yield buffer.grad_data

    def _state(self) -> list[Tensor]:
        """Return the optimizer's tensors on the training device that share no parameter's storage, one a storage."""
        parameters = [p for chunk in self._chunks for p in chunk.parameters()]
        device = parameters[0].device
        seen = {p.untyped_storage()._cdata for p in parameters}
        out = []
        for tensor in self._optimizer_tensors():
            storage = tensor.untyped_storage()._cdata
            if tensor.dim() and tensor.device == device and storage not in seen:
                seen.add(storage)
                out.append(tensor)
        return out

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        for part in optimizer_parts(self._optimizer):
            if part.optimizer is None:  # nothing to train on this rank
                continue
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))
