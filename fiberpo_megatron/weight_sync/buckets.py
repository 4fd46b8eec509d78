"""This module cuts a stream of named tensors into flat buckets."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fiberpo_megatron.weight_sync.base import Weights


@dataclass
class Bucket:
    """Holds tensors that travel as one flat uint8 tensor."""

    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Put a tensor at the end."""
        self.names.append(name)
        self.tensors.append(tensor)
        self.bytes += tensor.nbytes

    @property
    def dtypes(self) -> list[str]:
        """Return the tensors' types as SGLang names them: float32, bfloat16, ..."""
        return [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors]

    @property
    def shapes(self) -> list[list[int]]:
        """Return the tensors' shapes."""
        return [list(tensor.shape) for tensor in self.tensors]

    def flat(self, device: torch.device) -> Tensor:
        """Return the bytes of all tensors, one after the other, as uint8 [bytes] on `device`."""
        return torch.cat([t.detach().to(device).contiguous().view(-1).view(torch.uint8) for t in self.tensors])


def buckets(weights: Weights, limit: int) -> Iterator[tuple[Bucket, bool]]:
    """Yield pairs of a bucket and whether it is the last one. A bucket has at most `limit` bytes, or one tensor.

    A tensor whose element size does not divide its offset (float32 after an odd number of bfloat16) begins a new
    bucket, because the engine views the bytes in place.
    """
    bucket = Bucket()
    for name, tensor in weights:
        if bucket.names and (bucket.bytes + tensor.nbytes > limit or bucket.bytes % tensor.element_size()):
            yield bucket, False
            bucket = Bucket()
        bucket.add(name, tensor)
    if bucket.names:
        yield bucket, True
