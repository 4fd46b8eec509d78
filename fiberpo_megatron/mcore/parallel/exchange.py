"""This module sends rollouts and short texts between ranks as byte tensors, without pickling; sizes may differ."""

import json
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.types import RolloutBatch, batch_of, named_arrays

_ANY_TAG, _TREE_TAG = 7_001, 7_002
"""The messages of `any_true` and `gather_bytes` have tags of their own, so that none is taken for another one between
the same two ranks."""


def encode(batch: RolloutBatch) -> Tensor:
    """Return uint8 [..]: the length of a JSON header (8 bytes), the header with dtype and shape of every array, then
    the arrays' bytes."""
    arrays = {name: np.ascontiguousarray(array) for name, array in named_arrays(batch).items()}
    header = json.dumps({name: [array.dtype.str, array.shape] for name, array in arrays.items()}).encode()
    parts = [len(header).to_bytes(8, "little"), header, *(array.tobytes() for array in arrays.values())]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def decode(message: Tensor) -> RolloutBatch:
    """Return the batch of an encoded message."""
    data = message.numpy().tobytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    arrays: dict[str, NDArray[Any]] = {}
    for name, (kind, shape) in json.loads(data[8:begin]).items():
        count = math.prod(shape)
        arrays[name] = np.frombuffer(data, dtype=kind, count=count, offset=begin).copy().reshape(shape)
        begin += arrays[name].nbytes
    return batch_of(arrays)


def text_to_bytes(text: str) -> Tensor:
    """Return uint8 [..] of a text."""
    data = bytearray(text.encode())
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_to_text(message: Tensor) -> str:
    """Return the text of a message."""
    return message.numpy().tobytes().decode()


def all_gather_bytes(message: Tensor, group: Any) -> list[Tensor]:
    """Return every rank's message, in the group's rank order; sizes may differ."""
    size = torch.tensor([len(message)])
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(s.item()) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(message)] = message
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return [part[: int(s.item())] for part, s in zip(received, sizes)]


def gather_bytes(message: Tensor, group: Any, root: int = 0) -> list[Tensor]:
    """Return every rank's message on rank `root` of a Gloo group, in rank order, and an empty list on the others.

    Every rank calls it. The messages go up a tree: ceil(log2(ranks)) of them after one another bring everything.
    """
    size, at = dist.get_world_size(group), dist.get_rank(group)
    rank = (at - root) % size  # the tree's own numbers begin at the root
    lengths, data = torch.tensor([len(message)]), message.contiguous()
    reach = 1
    while reach < size and not rank & reach:
        if rank + reach < size:  # that rank has its own message and those of the ranks behind it
            theirs = torch.empty(min(reach, size - rank - reach), dtype=torch.int64)
            dist.recv(theirs, group=group, group_src=(at + reach) % size, tag=_TREE_TAG)
            received = torch.empty(int(theirs.sum()), dtype=torch.uint8)
            if len(received):
                dist.recv(received, group=group, group_src=(at + reach) % size, tag=_TREE_TAG)
            lengths, data = torch.cat([lengths, theirs]), torch.cat([data, received])
        reach *= 2
    if rank:
        dist.send(lengths, group=group, group_dst=(at - reach) % size, tag=_TREE_TAG)
        if len(data):
            dist.send(data, group=group, group_dst=(at - reach) % size, tag=_TREE_TAG)
        return []
    parts = list(data.split(lengths.tolist()))
    return [parts[(rank - root) % size] for rank in range(size)]


def any_true(flag: bool, group: Any) -> bool:
    """Return whether any rank of a Gloo group passed True. Every rank calls it, and none returns before all have.

    In round k each rank sends what it knows 2^k ranks further, so that ceil(log2(ranks)) messages after one another are
    enough. Gloo's all-reduce passes around a ring, in 2 (ranks - 1) of them: at 1,024 ranks a tenth of a second, which
    a step would pay some fifty times.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    seen, reached = torch.tensor([int(flag)]), 1
    while reached < size:
        heard = torch.empty_like(seen)
        sending = dist.isend(seen, group=group, group_dst=(rank + reached) % size, tag=_ANY_TAG)
        dist.recv(heard, group=group, group_src=(rank - reached) % size, tag=_ANY_TAG)
        assert sending is not None, "this rank belongs to the group"
        sending.wait()
        seen, reached = seen | heard, 2 * reached
    return bool(seen.item())


def gather_json(value: Any, group: Any) -> list[Any]:
    """Return every rank's value on the group's rank 0, in rank order, and an empty list on the others."""
    return [json.loads(bytes_to_text(part)) for part in gather_bytes(text_to_bytes(json.dumps(value)), group)]


def all_gather_json(value: Any, group: Any) -> list[Any]:
    """Return every rank's value (lists, numbers, strings), in the group's rank order, without pickling."""
    texts = [bytes_to_text(part) for part in gather_bytes(text_to_bytes(json.dumps(value)), group)]
    joined = text_to_bytes(f"[{','.join(texts)}]") if texts else None
    everyone = broadcast_bytes(joined, dist.get_global_rank(group, 0), group)
    return list(json.loads(bytes_to_text(everyone)))


def broadcast_bytes(message: Tensor | None, source: int, group: Any) -> Tensor:
    """Return the message of global rank `source` on every rank of the group; the other ranks pass None."""
    size = torch.tensor([0 if message is None else len(message)])
    dist.broadcast(size, src=source, group=group)
    out = message if message is not None else torch.empty(int(size.item()), dtype=torch.uint8)
    dist.broadcast(out, src=source, group=group)
    return out
