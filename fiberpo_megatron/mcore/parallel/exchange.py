"""Rollouts and short texts between ranks, as byte tensors: no pickling, unequal sizes welcome."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.types import RolloutBatch

_ARRAYS = tuple(field.name for field in fields(RolloutBatch))
_DTYPES = {
    "tokens": np.int64,
    "response_mask": np.bool_,
    "rollout_log_probs": np.float32,
    "lengths": np.int64,
    "rewards": np.float32,
    "correct": np.bool_,
    "groups": np.int64,
    "domains": np.int64,
    "truncated": np.bool_,
    "routed_experts": np.int16,
}
_DIMS = 3
"""Most dimensions of an array; shapes travel padded with ones."""


def encode(batch: RolloutBatch) -> Tensor:
    """uint8 [..]: the shape of every array, then their bytes."""
    arrays: list[NDArray[Any]] = [np.ascontiguousarray(getattr(batch, name), dtype=_DTYPES[name]) for name in _ARRAYS]
    header = np.array([array.shape + (1,) * (_DIMS - array.ndim) for array in arrays], dtype=np.int64)
    return torch.frombuffer(bytearray(b"".join(x.tobytes() for x in (header, *arrays))), dtype=torch.uint8)


def decode(message: Tensor) -> RolloutBatch:
    """The inverse of `encode`."""
    data = message.numpy().tobytes()
    shapes = np.frombuffer(data, dtype=np.int64, count=_DIMS * len(_ARRAYS)).reshape(-1, _DIMS)
    offset = shapes.nbytes
    arrays: dict[str, Any] = {}
    for name, shape in zip(_ARRAYS, shapes.tolist()):
        dtype, count = np.dtype(_DTYPES[name]), math.prod(shape)
        array = np.frombuffer(data, dtype=dtype, count=count, offset=offset).copy()
        arrays[name] = array.reshape(shape) if name == "routed_experts" else array
        offset += array.nbytes
    return RolloutBatch(**arrays)


def join(shares: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of all shares in order; groups are numbered 0, 1, ... through all of them."""
    groups = []
    seen = 0
    for share in shares:
        labels, dense = np.unique(share.groups, return_inverse=True)
        groups.append(dense.astype(np.int64) + seen)
        seen += len(labels)
    filled = [share for share in shares if len(share.tokens)] or list(shares)
    joined = {name: np.concatenate([getattr(share, name) for share in filled]) for name in _ARRAYS}
    return replace(RolloutBatch(**joined), groups=np.concatenate(groups))


def text_to_bytes(text: str) -> Tensor:
    """uint8 [..] of a text."""
    data = bytearray(text.encode())
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_to_text(message: Tensor) -> str:
    """The inverse of `text_to_bytes`."""
    return message.numpy().tobytes().decode()


def all_gather_bytes(message: Tensor, group: Any) -> list[Tensor]:
    """Every rank's message, in the group's rank order; sizes may differ."""
    size = torch.tensor([len(message)])
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(s.item()) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(message)] = message
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return [part[: int(s.item())] for part, s in zip(received, sizes)]


def all_gather_json(value: Any, group: Any) -> list[Any]:
    """Every rank's value (lists, numbers, strings), in the group's rank order. No pickle: data stays data."""
    return [json.loads(bytes_to_text(m)) for m in all_gather_bytes(text_to_bytes(json.dumps(value)), group)]


def broadcast_bytes(message: Tensor | None, source: int, group: Any) -> Tensor:
    """The message of global rank `source` on every rank of the group; the others pass None."""
    size = torch.tensor([0 if message is None else len(message)])
    dist.broadcast(size, src=source, group=group)
    out = message if message is not None else torch.empty(int(size.item()), dtype=torch.uint8)
    dist.broadcast(out, src=source, group=group)
    return out
