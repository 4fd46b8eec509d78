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


def all_gather_json(value: Any, group: Any) -> list[Any]:
    """Return every rank's value (lists, numbers, strings), in the group's rank order, without pickling."""
    return [json.loads(bytes_to_text(m)) for m in all_gather_bytes(text_to_bytes(json.dumps(value)), group)]


def broadcast_bytes(message: Tensor | None, source: int, group: Any) -> Tensor:
    """Return the message of global rank `source` on every rank of the group; the other ranks pass None."""
    size = torch.tensor([0 if message is None else len(message)])
    dist.broadcast(size, src=source, group=group)
    out = message if message is not None else torch.empty(int(size.item()), dtype=torch.uint8)
    dist.broadcast(out, src=source, group=group)
    return out
