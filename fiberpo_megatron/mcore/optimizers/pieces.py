"""This module describes a shard of the distributed optimizer to a checkpoint, without gathering the other shards.

A data-parallel rank has a range of the elements of each parameter's state, counted in the flattened parameter. In the
shape of the parameter such a range is a few boxes: the end of a row, whole rows, the beginning of a row. Each box lies
in one piece of memory, so that it is saved from there and read into it. In the checkpoint they are parts of the whole
tensors under the parameters' names, which any layout can load.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Numbers = tuple[int, ...]


def boxes(shape: Numbers, begin: int, end: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield the boxes, as (offsets, sizes), that hold elements [begin, end) of a flattened tensor, in order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    (first, start), (last, stop) = divmod(begin, inner), divmod(end, inner)
    if first == last:
        yield from (((first, *at), (1, *size)) for at, size in boxes(shape[1:], start, stop))
        return
    if start:
        yield from (((first, *at), (1, *size)) for at, size in boxes(shape[1:], start, inner))
        first += 1
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if stop:
        yield from (((last, *at), (1, *size)) for at, size in boxes(shape[1:], 0, stop))


def pieces(
    described: ShardedTensor | ShardedTensorFactory, name: str, shard: Tensor, begin: int
) -> list[ShardedTensor]:
    """Return what one shard of a parameter's state holds of the tensors in a checkpoint; their data are views of it.

    Args:
        described: what Megatron says about the parameter.
        name: of the state; it stands before the parameter's name in the checkpoint.
        shard: [m] the elements of the flattened parameter from `begin` on.

    Raises ValueError where Megatron transposes or copies a parameter for its checkpoint, so that its elements lie in
    another order.
    """
    found: list[ShardedTensor] = []
    for part, start in _parts(described, name, shard.dtype):
        size = prod(part.local_shape)
        low, high = max(begin, start), min(begin + len(shard), start + size)
        more, at = part.prepend_axis_num, low - begin
        for offsets, sizes in boxes(part.local_shape, low - start, high - start):
            data = shard[at : at + prod(sizes)].view((1,) * more + sizes)
            inside = zip(part.global_offset[more:], offsets, strict=True)
            found.append(
                replace(
                    part,
                    data=data,
                    local_shape=tuple(data.shape),
                    global_offset=(*part.global_offset[:more], *(a + b for a, b in inside)),
                    axis_fragmentations=None,  # the boxes are no grid
                    replica_id=(*part.replica_id[:2], 0),  # no other data-parallel rank has these elements
                    prepend_axis_num=0,
                )
            )
            at += prod(sizes)
    return found


def _parts(
    described: ShardedTensor | ShardedTensorFactory, name: str, dtype: torch.dtype
) -> Iterator[tuple[ShardedTensor, int]]:
    """Yield the tensors of a checkpoint that a parameter consists of, without data, and where in it each begins."""
    assert described.data is not None, "Megatron keeps the parameter beside its description"
    shape, key = described.data.shape, f"{name}.{described.key}"
    outline = torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(described, ShardedTensor):
        built: list[Any] = [replace(described, key=key, data=outline, dtype=dtype)]
    else:  # gate and up projection of an MLP, which are one parameter and two tensors of the checkpoint
        built = replace(described, key=key, data=outline).build()
    for part in built:
        if not isinstance(part, ShardedTensor) or part.data is None or not part.data.is_contiguous():
            raise ValueError(f"the elements of {key} have another order in a checkpoint than in memory")
        if len(part.replica_id) != 3:
            raise ValueError(f"{key} has the replica {part.replica_id}; (pipeline, tensor, data) was expected")
        yield replace(part, data=None), part.data.storage_offset()
