"""This module lays named tensors one after the other into one flat buffer of bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fiberpo_megatron.interfaces import NamedShape

ALIGNMENT = 16
"""A bucket takes a multiple of this many bytes, so that another bucket may follow it in the same buffer."""


@dataclass(frozen=True)
class Bucket:
    """Describes tensors that travel as one flat uint8 tensor. Make one with `bucket`."""

    tensors: Sequence[NamedShape]

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def padded_bytes(self) -> int:
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT

    @cached_property
    def names(self) -> list[str]:
        return [tensor.name for tensor in self.tensors]

    @cached_property
    def dtypes(self) -> list[str]:
        """List the tensors' types as SGLang names them: float32, bfloat16, ..."""
        return [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors]

    @cached_property
    def shapes(self) -> list[list[int]]:
        return [list(tensor.shape) for tensor in self.tensors]

    @cached_property
    def offsets(self) -> list[int]:
        """List where each tensor begins, in bytes."""
        found, at = [], 0
        for tensor in self.tensors:
            found.append(at)
            at += tensor.nbytes
        return found

    def in_order(self, tensors: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """Return the values in the bucket's order. Raises ValueError unless they are the tensors of the bucket."""
        found = dict(tensors)
        for announced in self.tensors:
            tensor = found.pop(announced.name, None)
            if tensor is None or (tuple(tensor.shape), tensor.dtype) != (announced.shape, announced.dtype):
                seen = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"the policy announced {announced}, but exported {seen}; correct its export")
        if found:
            raise ValueError(f"the policy exported {next(iter(found))}, which it had not announced; correct its export")
        values = dict(tensors)
        return [values[name] for name in self.names]

    def fill(self, flat: Tensor, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Write the tensors' bytes into `flat`, uint8 [at least nbytes] on any device. Raises ValueError for others."""
        for offset, tensor in zip(self.offsets, self.in_order(tensors), strict=True):
            flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def bucket(tensors: Iterable[NamedShape]) -> Bucket:
    """Return a bucket of these tensors: those with large elements first, so that each can be viewed in place."""
    return Bucket(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize))
