"""This module lets several ranks of a layout share one GPU, which NCCL refuses: their messages travel through the host.

    from tools.shared_gpu import share_gpu

    share_gpu()    # in each rank, before its layout starts
    ...            # tensors of every collective may lie on the GPU

`StagedGroup` is a process group for tests. A collective copies its tensors to the host, exchanges their bytes over
gloo, reduces there in the order of the ranks, and copies the result back when its work is waited for. Every rank thus
gets the same bits. Sums of half precision are made in float32 and rounded once. Tensors of the host work as well.

What it cannot show is NCCL itself: its kernels, its transport, its order of sums, and what its streams overlap with.
The host waits for the GPU before and after each message, so that a missing wait between two streams stays unseen too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "staged"
"""Name under which torch knows the backend."""
_FIRST_TAG = 1 << 24
"""Messages of collectives have tags from here on; those of send and recv have the caller's."""
_NARROW = (torch.float16, torch.bfloat16)


class StagedWork(dist.Work):
    """Waits for the messages of one operation, then puts what they brought into its tensors."""

    def __init__(
        self, messages: Sequence[Any], finish: Callable[[], None], after: Callable[[StagedWork], None]
    ) -> None:
        super().__init__()
        self._messages = messages
        self._finish: Callable[[], None] | None = finish
        self._after = after

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return True when the tensors hold the result. Raises RuntimeError when a message fails or is late."""
        if self._finish is None:
            return True
        for message in self._messages:
            message.wait(timeout) if timeout else message.wait()
        finish, self._finish = self._finish, None
        finish()
        _synchronize()
        self._after(self)
        return True

    def synchronize(self) -> None:
        """Do as `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Return whether somebody has waited for the work: before, its tensors are not filled."""
        return self._finish is None

    def is_success(self) -> bool:
        """Return whether the work has completed; one that failed raises in `wait`."""
        return self._finish is None


class _Together:
    """Waits for several works as for one."""

    def __init__(self, works: Sequence[StagedWork]) -> None:
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class StagedGroup(dist.ProcessGroup):
    """Exchanges tensors of any device over gloo. Its methods are those that torch.distributed calls in 2.11 to 2.14."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)  # type: ignore[attr-defined]
        self._me, self._size = rank, size
        self._calls = 0
        self._open: set[StagedWork] = set()  # messages must outlive a caller that drops the handle
        self._together: list[StagedWork] | None = None

    def getBackendName(self) -> str:
        """Return the name that the C++ side shows."""
        return BACKEND

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def shutdown(self) -> None:
        """Close the connections."""
        self._open.clear()
        self._gloo = None

    def abort(self) -> None:
        """Do as `shutdown`."""
        self.shutdown()

    # What everything else is made of

    def _work(self, messages: Sequence[Any], finish: Callable[[], None]) -> StagedWork:
        work = StagedWork(messages, finish, self._open.discard)
        self._open.add(work)
        if self._together is not None:
            self._together.append(work)
        return work

    def _exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], finish: Callable[[dict[int, Tensor]], None]
    ) -> StagedWork:
        """Send bytes to ranks and receive so many from others; `finish` gets what came, this rank's own share included.

        Every rank of the group calls it at the same place. Nothing is sent where there are no bytes.
        """
        tag = _FIRST_TAG + self._calls % _FIRST_TAG
        self._calls += 1
        received = {peer: torch.empty(size, dtype=torch.uint8) for peer, size in incoming.items()}
        messages = []
        for step in range(1, self._size):  # each rank starts with another peer
            to, source = (self._me + step) % self._size, (self._me - step) % self._size
            if source in received and len(received[source]):
                messages.append(self._gloo.recv([received[source]], source, tag))
            if to in outgoing and len(outgoing[to]):
                messages.append(self._gloo.send([outgoing[to]], to, tag))
        if self._me in received:
            received[self._me] = outgoing[self._me]
        return self._work(messages, lambda: finish(received))

    def _everyone(self, mine: Tensor, sizes: Sequence[int], finish: Callable[[list[Tensor]], None]) -> StagedWork:
        """Give this rank's bytes to all ranks, and `finish` theirs in rank order; `sizes` are those of all."""
        ranks = range(self._size)
        return self._exchange(
            dict.fromkeys(ranks, mine), dict(enumerate(sizes)), lambda found: finish([found[rank] for rank in ranks])
        )

    def _pieces(
        self, parts: Sequence[Tensor], sizes: Sequence[int], finish: Callable[[list[Tensor]], None]
    ) -> StagedWork:
        """Give each rank one part, and `finish` this rank's parts of all of them."""
        return self._exchange(
            dict(enumerate(parts)),
            dict(enumerate(sizes)),
            lambda found: finish([found[rank] for rank in range(self._size)]),
        )

    # Reductions

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Reduce each tensor over the ranks, in place. Raises ValueError for an operation that is not known."""
        reduce = _reduction(opts)

        def one(tensor: Tensor) -> StagedWork:
            size = _bytes_of(tensor)
            return self._everyone(
                _staged(tensor), [size] * self._size, lambda found: _fill(tensor, reduce(found, tensor.dtype))
            )

        return _joined([one(tensor) for tensor in tensors])

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Do as `allreduce`."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Any:
        """Reduce one tensor to the root; the others keep theirs."""
        (tensor,), root, reduce = tensors, opts.rootRank, _reduction(opts)
        if self._me != root:
            return self._exchange({root: _staged(tensor)}, {}, lambda found: None)
        return self._exchange(
            {root: _staged(tensor)},
            dict.fromkeys(range(self._size), _bytes_of(tensor)),
            lambda found: _fill(tensor, reduce([found[rank] for rank in range(self._size)], tensor.dtype)),
        )

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Any:
        """Reduce the inputs, of which each rank keeps the one with its number; their sizes may differ."""
        reduce = _reduction(opts)

        def one(out: Tensor, parts: Sequence[Tensor]) -> StagedWork:
            sent = [_staged(part) for part in parts]
            return self._pieces(sent, [_bytes_of(out)] * self._size, lambda found: _fill(out, reduce(found, out.dtype)))

        return _joined([one(out, parts) for out, parts in zip(outputs, inputs)])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Reduce the input, which is cut into equal parts along its elements."""
        return self.reduce_scatter([output], [_equal_parts(input, self._size)], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """Do as `reduce_scatter_single` for several tensors."""
        return self.reduce_scatter(outputs, [_equal_parts(one, self._size) for one in inputs], opts)

    # Gathering and spreading

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        """Give every rank all ranks' inputs; their sizes may differ."""

        def one(outs: Sequence[Tensor], mine: Tensor) -> StagedWork:
            def fill(found: list[Tensor]) -> None:
                for out, part in zip(outs, found):
                    _fill(out, part)

            return self._everyone(_staged(mine), [_bytes_of(out) for out in outs], fill)

        return _joined([one(outs, mine) for outs, mine in zip(outputs, inputs)])

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """Give every rank all ranks' lists of inputs: `outputs` has one list for each rank."""
        return self.allgather(list(zip(*outputs)), inputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Join the inputs of all ranks, one after the other."""
        return self._everyone(
            _staged(input), [_bytes_of(input)] * self._size, lambda found: _fill(output, torch.cat(found))
        )

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        """Do as `all_gather_single` for several tensors."""
        return _joined([self.all_gather_single(out, one, opts) for out, one in zip(outputs, inputs)])

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] | None,
        input_split_sizes: Sequence[int] | None,
        opts: Any = None,
    ) -> Any:
        """Give each rank a run of the input's rows; without split sizes all runs are equally long."""
        received = [_bytes_of(part) for part in _runs(output, output_split_sizes, self._size)]
        parts = [_staged(part) for part in _runs(input, input_split_sizes, self._size)]
        return self._pieces(parts, received, lambda found: _fill(output, torch.cat(found)))

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        """Give each rank one tensor."""

        def fill(found: list[Tensor]) -> None:
            for out, part in zip(outputs, found):
                _fill(out, part)

        return self._pieces([_staged(one) for one in inputs], [_bytes_of(out) for out in outputs], fill)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Any:
        """Give every rank the root's tensor."""
        (tensor,), root = tensors, opts.rootRank
        if self._me == root:
            sent = _staged(tensor)
            return self._exchange(dict.fromkeys(range(self._size), sent), {}, lambda found: None)
        return self._exchange({}, {root: _bytes_of(tensor)}, lambda found: _fill(tensor, found[root]))

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Any:
        """Give the root all ranks' inputs; the others pass no outputs."""
        (mine,), root = inputs, opts.rootRank
        if self._me != root:
            return self._exchange({root: _staged(mine)}, {}, lambda found: None)
        (outs,) = outputs

        def fill(found: dict[int, Tensor]) -> None:
            for rank, out in enumerate(outs):
                _fill(out, found[rank])

        return self._exchange({root: _staged(mine)}, {rank: _bytes_of(out) for rank, out in enumerate(outs)}, fill)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Any:
        """Give each rank one of the root's inputs; the others pass none."""
        (out,), root = outputs, opts.rootRank
        parts = {rank: _staged(part) for rank, part in enumerate(inputs[0])} if self._me == root else {}
        return self._exchange(parts, {root: _bytes_of(out)}, lambda found: _fill(out, found[root]))

    def barrier(self, opts: Any = None) -> Any:
        """Return a work that ends when every rank has called this and its GPU has done what it was given before."""
        return self.allreduce([torch.ones(1)])

    # From one rank to another

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int = 0) -> Any:
        """Send one tensor as it is now; the caller may change it at once."""
        (tensor,) = tensors
        staged = _staged(tensor)
        return self._work([self._gloo.send([staged], rank, _user_tag(tag))] if len(staged) else [], lambda: None)

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int = 0) -> Any:
        """Receive one tensor, which is filled when the work is waited for."""
        (tensor,) = tensors
        staged = torch.empty(_bytes_of(tensor), dtype=torch.uint8)
        messages = [self._gloo.recv([staged], rank, _user_tag(tag))] if len(staged) else []
        return self._work(messages, lambda: _fill(tensor, staged))

    def _start_coalescing(self, device: Any = None) -> None:
        self._together = []

    def _end_coalescing(self, device: Any = None) -> Any:
        works, self._together = self._together or [], None
        return _Together(works)

    # Names of torch 2.11
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def register() -> str:
    """Make the backend known to torch in this process, and return its name; doing so twice does nothing."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, StagedGroup, devices=["cpu", "cuda"])
    return BACKEND


def share_gpu() -> None:
    """Give this rank the first GPU, whatever its number, and the staged backend; without a GPU, the CPU platform.

    It must come before the layout starts and before this process uses CUDA.
    """
    os.environ["LOCAL_RANK"] = "0"  # the GPU platform takes the GPU of this number
    from fiberpo_megatron.mcore.platform import activate

    activate().backend = register()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _bytes_of(tensor: Tensor) -> int:
    """Return the number of a tensor's bytes. Raises ValueError where they do not lie together, as NCCL does."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"a tensor {list(tensor.shape)} with strides {list(tensor.stride())} is not contiguous, and NCCL refuses "
            "such a one; pass a contiguous copy"
        )
    return tensor.numel() * tensor.element_size()


def _staged(tensor: Tensor) -> Tensor:
    """Return a copy of the tensor's bytes on the host, [n] uint8. Raises ValueError when it is not contiguous."""
    _bytes_of(tensor)
    _synchronize()
    return tensor.detach().to("cpu", copy=True).reshape(-1).view(torch.uint8)


def _fill(tensor: Tensor, received: Tensor) -> None:
    """Put bytes [n] into a tensor. Raises ValueError when they are not as many as its own."""
    if len(received) != _bytes_of(tensor):
        raise ValueError(
            f"{len(received)} bytes arrived for a tensor {list(tensor.shape)} of {tensor.dtype}, which has "
            f"{_bytes_of(tensor)}; the ranks must pass tensors that fit each other"
        )
    with torch.no_grad():
        tensor.detach().copy_(received.view(tensor.dtype).reshape(tensor.shape))


def _equal_parts(tensor: Tensor, count: int) -> list[Tensor]:
    """Cut [count * n, ...] along its elements. Raises ValueError when they do not divide."""
    if tensor.numel() % count:
        raise ValueError(f"{list(tensor.shape)} cannot be cut into {count} equal parts; pad it to a multiple of them")
    return list(tensor.contiguous().reshape(count, -1))


def _runs(tensor: Tensor, sizes: Sequence[int] | None, count: int) -> list[Tensor]:
    if sizes is None or not len(sizes):
        return _equal_parts(tensor, count)
    return list(tensor.split([int(size) for size in sizes]))


def _user_tag(tag: int) -> int:
    if not 0 <= tag < _FIRST_TAG:
        raise ValueError(f"tag {tag} must be from 0 to {_FIRST_TAG - 1}, since collectives use those above")
    return tag


def _joined(works: Sequence[StagedWork]) -> Any:
    return works[0] if len(works) == 1 else _Together(works)


def _reduction(opts: Any) -> Callable[[list[Tensor], torch.dtype], Tensor]:
    """Return a function of all ranks' bytes [n] in rank order and of their type, which returns the bytes of the result.
    Raises ValueError for an operation that is not known."""
    op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    known: list[tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = [
        (dist.ReduceOp.SUM, torch.add),
        (dist.ReduceOp.AVG, torch.add),
        (dist.ReduceOp.PRODUCT, torch.mul),
        (dist.ReduceOp.MIN, torch.minimum),
        (dist.ReduceOp.MAX, torch.maximum),
        (dist.ReduceOp.BAND, torch.bitwise_and),
        (dist.ReduceOp.BOR, torch.bitwise_or),
        (dist.ReduceOp.BXOR, torch.bitwise_xor),
    ]
    pair = next((pair for name, pair in known if op == name), None)
    if pair is None:
        raise ValueError(f"the operation {op} is not known; use one of {', '.join(str(name) for name, _ in known)}")
    mean = op == dist.ReduceOp.AVG

    def reduce(found: list[Tensor], dtype: torch.dtype) -> Tensor:
        wide = torch.float32 if dtype in _NARROW else dtype
        total = found[0].view(dtype).to(wide, copy=True)
        for part in found[1:]:
            total = pair(total, part.view(dtype).to(wide))
        if mean:
            total = total / len(found) if dtype.is_floating_point else total.div(len(found), rounding_mode="trunc")
        return total.to(dtype).contiguous().view(torch.uint8)

    return reduce
