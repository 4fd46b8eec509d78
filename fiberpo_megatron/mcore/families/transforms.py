"""How one Megatron parameter and one or more Hugging Face tensors are made from each other.

A transform knows three things: the full shapes of the Hugging Face tensors behind a parameter, how a
tensor-parallel shard is read from them (only the rows or columns that it needs), and how the shards of all
ranks are put together again. Loading and exporting are exact inverses: no value is changed, only moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fiberpo_megatron.mcore.families.architecture import read_architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """The `rank`-th of `size` equal parts of a parameter."""

    rank: int
    size: int


@dataclass(frozen=True)
class Dimensions:
    """What the transforms and tables need to know of a Hugging Face config."""

    vocab_size: int
    layers: int
    experts: int
    """Routed experts per MoE layer; 0 for a dense model."""
    heads: int
    kv_heads: int
    head_dim: int
    tied_embeddings: bool
    predict_layers: int = 0
    """Multi-token prediction layers behind the model's own."""

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, object]) -> "Dimensions":
        """Read config.json's fields; raises ValueError as `read_architecture` does."""
        architecture = read_architecture(hf_config)
        return cls(
            vocab_size=architecture.vocab_size,
            layers=architecture.layers,
            experts=architecture.experts.count if architecture.experts else 0,
            heads=architecture.heads,
            kv_heads=architecture.key_value_heads,
            head_dim=architecture.head_dim,
            tied_embeddings=architecture.tied_embeddings,
            predict_layers=architecture.predict_layers,
        )


class TensorReader(Protocol):
    """Reads parts of named tensors from a checkpoint."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of `name` along `dim`; the whole tensor when `stop` is None."""
        ...


class Transform(Protocol):
    def hf_shapes(self, local: Shape, size: int, dims: Dimensions) -> list[Shape]:
        """Full shapes of the Hugging Face tensors of a parameter with `size` shards of shape `local`."""
        ...

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, dims: Dimensions) -> Tensor:
        """This shard, of shape `local`, from the tensors called `names`."""
        ...

    def merge(self, shards: Sequence[Tensor], dims: Dimensions) -> list[Tensor]:
        """The Hugging Face tensors, freshly allocated, from all shards in order."""
        ...


@dataclass(frozen=True)
class Whole:
    """The same tensor on every tensor-parallel rank (norms, routers)."""

    def hf_shapes(self, local: Shape, size: int, dims: Dimensions) -> list[Shape]:
        return [local]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, dims: Dimensions) -> Tensor:
        return read.read(names[0])

    def merge(self, shards: Sequence[Tensor], dims: Dimensions) -> list[Tensor]:
        return [shards[0].clone()]


@dataclass(frozen=True)
class Split:
    """Equal parts along `dim`: 0 for column-parallel linears, 1 for row-parallel ones."""

    dim: int

    def hf_shapes(self, local: Shape, size: int, dims: Dimensions) -> list[Shape]:
        return [(*local[: self.dim], local[self.dim] * size, *local[self.dim + 1 :])]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, dims: Dimensions) -> Tensor:
        width = local[self.dim]
        return read.read(names[0], self.dim, shard.rank * width, (shard.rank + 1) * width)

    def merge(self, shards: Sequence[Tensor], dims: Dimensions) -> list[Tensor]:
        return [torch.cat(list(shards), dim=self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, padded by Megatron to equal parts: zeros on load, cut off on export."""

    def hf_shapes(self, local: Shape, size: int, dims: Dimensions) -> list[Shape]:
        if local[0] * size < dims.vocab_size:
            raise ValueError(f"{local[0]} rows x {size} shards hold fewer than vocab_size = {dims.vocab_size}")
        return [(dims.vocab_size, *local[1:])]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, dims: Dimensions) -> Tensor:
        start = min(shard.rank * local[0], dims.vocab_size)
        stop = min(start + local[0], dims.vocab_size)
        rows = read.read(names[0], 0, start, stop)
        return torch.cat([rows, rows.new_zeros(local[0] - len(rows), *local[1:])])

    def merge(self, shards: Sequence[Tensor], dims: Dimensions) -> list[Tensor]:
        rows = torch.cat(list(shards))
        return [rows if len(rows) == dims.vocab_size else rows[: dims.vocab_size].clone()]


@dataclass(frozen=True)
class GateUp:
    """SwiGLU's first linear: each shard holds its part of the gate above its part of the up projection."""

    def hf_shapes(self, local: Shape, size: int, dims: Dimensions) -> list[Shape]:
        return [(local[0] // 2 * size, *local[1:])] * 2

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, dims: Dimensions) -> Tensor:
        rows = local[0] // 2
        return torch.cat([read.read(name, 0, shard.rank * rows, (shard.rank + 1) * rows) for name in names])

    def merge(self, shards: Sequence[Tensor], dims: Dimensions) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([pair[part] for pair in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class Qkv:
    """Query, key, value in one linear (weight or bias): for each KV group its queries, its key, its value."""

    def hf_shapes(self, local: Shape, size: int, dims: Dimensions) -> list[Shape]:
        if dims.kv_heads % size:
            raise ValueError(f"{dims.kv_heads} key-value heads do not divide over {size} tensor-parallel ranks")
        fused = (dims.heads + 2 * dims.kv_heads) * dims.head_dim
        if local[0] * size != fused:
            raise ValueError(
                f"{local[0]} rows x {size} shards, but {dims.heads} query and {dims.kv_heads} key-value "
                f"heads of size {dims.head_dim} make {fused}"
            )
        return [(heads * dims.head_dim, *local[1:]) for heads in (dims.heads, dims.kv_heads, dims.kv_heads)]

    def load(self, read: TensorReader, names: Sequence[str], local: Shape, shard: Shard, dims: Dimensions) -> Tensor:
        groups = dims.kv_heads // shard.size
        parts = []
        for name, per_group in zip(names, (dims.heads // dims.kv_heads, 1, 1), strict=True):
            rows = groups * per_group * dims.head_dim
            part = read.read(name, 0, shard.rank * rows, (shard.rank + 1) * rows)
            parts.append(part.view(groups, per_group * dims.head_dim, *local[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], dims: Dimensions) -> list[Tensor]:
        queries = dims.heads // dims.kv_heads * dims.head_dim
        sizes = [queries, dims.head_dim, dims.head_dim]
        split = [shard.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1) for shard in shards]
        return [torch.cat([parts[i].flatten(0, 1) for parts in split]) for i in range(3)]
