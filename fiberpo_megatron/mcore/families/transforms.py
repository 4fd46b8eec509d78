"""Defines how one Megatron parameter and one or more Hugging Face tensors are made from each other.

A transform knows three things: the full shapes of the Hugging Face tensors behind a parameter, how a
tensor-parallel shard is read from them (only the rows or columns that it needs), and how the shards of all
ranks are put together again. Loading and exporting are exact inverses: values are moved and never changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fiberpo_megatron.mcore.families.architecture import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """This is the `rank`-th of `size` equal parts of a parameter."""

    rank: int
    size: int


class TensorReader(Protocol):
    """Reads parts of named tensors from a folder of weights."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the elements [start, stop) of `name` along `dim`; the whole tensor when `stop` is None."""
        ...


class Transform(Protocol):
    """Turns the tensors of a rule into shards of its parameter, and shards into tensors."""

    def hf_shapes(self, local: Shape, size: int, model: Architecture) -> list[Shape]:
        """Return the full shapes of the Hugging Face tensors of a parameter with `size` shards of shape `local`.

        Raises ValueError when `size` shards cannot make up the tensors of this model.
        """
        ...

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, model: Architecture) -> Tensor:
        """Return this shard, of shape `local`, read from the tensors called `names`."""
        ...

    def merge(self, shards: Sequence[Tensor], model: Architecture) -> list[Tensor]:
        """Return the Hugging Face tensors, newly allocated, made from all shards in order."""
        ...


@dataclass(frozen=True)
class Whole:
    """This parameter is the same tensor on every tensor-parallel rank (norms, routers)."""

    def hf_shapes(self, local: Shape, size: int, model: Architecture) -> list[Shape]:
        return [local]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, model: Architecture) -> Tensor:
        return read.read(names[0])

    def merge(self, shards: Sequence[Tensor], model: Architecture) -> list[Tensor]:
        return [shards[0].clone()]


@dataclass(frozen=True)
class Split:
    """This parameter is cut into equal parts along `dim`: 0 for column-parallel linears, 1 for row-parallel ones."""

    dim: int

    def hf_shapes(self, local: Shape, size: int, model: Architecture) -> list[Shape]:
        return [(*local[: self.dim], local[self.dim] * size, *local[self.dim + 1 :])]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, model: Architecture) -> Tensor:
        width = local[self.dim]
        return read.read(names[0], self.dim, shard.rank * width, (shard.rank + 1) * width)

    def merge(self, shards: Sequence[Tensor], model: Architecture) -> list[Tensor]:
        return [torch.cat(list(shards), dim=self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """This parameter has a row per token, and Megatron pads the rows to equal parts.

    The padding is zero after loading, and exporting cuts it off.
    """

    def hf_shapes(self, local: Shape, size: int, model: Architecture) -> list[Shape]:
        if local[0] * size < model.vocab_size:
            raise ValueError(f"{local[0]} rows x {size} shards hold fewer than vocab_size = {model.vocab_size}")
        return [(model.vocab_size, *local[1:])]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, model: Architecture) -> Tensor:
        start = min(shard.rank * local[0], model.vocab_size)
        stop = min(start + local[0], model.vocab_size)
        rows = read.read(names[0], 0, start, stop)
        return torch.cat([rows, rows.new_zeros(local[0] - len(rows), *local[1:])])

    def merge(self, shards: Sequence[Tensor], model: Architecture) -> list[Tensor]:
        rows = torch.cat(list(shards))
        return [rows if len(rows) == model.vocab_size else rows[: model.vocab_size].clone()]


@dataclass(frozen=True)
class GateUp:
    """This is the first linear of SwiGLU: each shard holds its part of the gate above its part of the up projection."""

    def hf_shapes(self, local: Shape, size: int, model: Architecture) -> list[Shape]:
        return [(local[0] // 2 * size, *local[1:])] * 2

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, model: Architecture) -> Tensor:
        rows = local[0] // 2
        return torch.cat([read.read(name, 0, shard.rank * rows, (shard.rank + 1) * rows) for name in names])

    def merge(self, shards: Sequence[Tensor], model: Architecture) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([pair[part] for pair in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class Qkv:
    """This is one linear (weight or bias) for queries, keys and values.

    For each group of key-value heads it holds the group's queries, its key and its value.
    """

    def hf_shapes(self, local: Shape, size: int, model: Architecture) -> list[Shape]:
        if model.key_value_heads % size:
            raise ValueError(f"{model.key_value_heads} key-value heads do not divide over {size} tensor-parallel ranks")
        fused = (model.heads + 2 * model.key_value_heads) * model.head_dim
        if local[0] * size != fused:
            raise ValueError(
                f"{local[0]} rows x {size} shards, but {model.heads} query and {model.key_value_heads} key-value "
                f"heads of size {model.head_dim} make {fused}"
            )
        counts = (model.heads, model.key_value_heads, model.key_value_heads)
        return [(heads * model.head_dim, *local[1:]) for heads in counts]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, model: Architecture) -> Tensor:
        groups = model.key_value_heads // shard.size
        parts = []
        for name, per_group in zip(names, (model.heads // model.key_value_heads, 1, 1), strict=True):
            rows = groups * per_group * model.head_dim
            part = read.read(name, 0, shard.rank * rows, (shard.rank + 1) * rows)
            parts.append(part.view(groups, per_group * model.head_dim, *local[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], model: Architecture) -> list[Tensor]:
        queries = model.heads // model.key_value_heads * model.head_dim
        sizes = [queries, model.head_dim, model.head_dim]
        split = [shard.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1) for shard in shards]
        return [torch.cat([parts[i].flatten(0, 1) for parts in split]) for i in range(3)]
