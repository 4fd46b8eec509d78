"""Bytes of parameters, gradients and optimizer state on one rank, exactly as Megatron-Core 0.16 lays them out.

Sources: `_ParamAndGradBuffer` (distributed/param_and_grad_buffer.py) for buffers and their padding,
`DistributedOptimizer` (optimizer/distrib_optimizer.py) for the shards, and `mcore/optimizers/build.py`
for the settings: float32 gradients, no overlap and so one bucket a buffer. tests/planning/test_states.py counts real
ranks' tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Literal

from fiberpo_megatron.mcore.families import Architecture
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.planning.parameters import Weight, chunk_weights

Adam = Literal["torch", "fused"]
"""torch's AdamW (no GPU) keeps a float32 step count per parameter; the fused one of a GPU keeps a single one."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
MOMENT_BYTES = 8
"""Two float32 moments of Adam."""
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Position:
    """Where a rank stands, as far as its memory depends on it."""

    stage: int
    """Pipeline stage."""
    data: int = 0
    """Rank among the data x context ranks."""
    expert_data: int = 0
    """Rank among the expert-data-parallel ranks."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes that live as long as the run."""

    parameters: int
    gradients: int
    optimizer: int
    """Float32 master weights where the parameters are bfloat16, both moments, step counts."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class _Buffer:
    """One contiguous gradient buffer: buckets of [start, end) parameter ranges."""

    buckets: tuple[tuple[tuple[int, int], ...], ...]
    ends: tuple[int, ...]
    """Padded end of each bucket."""

    @property
    def numel(self) -> int:
        return self.ends[-1] if self.ends else 0

    def shard(self, rank: int, ranks: int) -> list[int]:
        """Elements of every parameter that the shard of `rank` holds, of those that it holds any of."""
        held = []
        for index, ranges in enumerate(self.buckets):
            begin = self.ends[index - 1] if index else 0
            size = (self.ends[index] - begin) // ranks
            low, high = begin + rank * size, begin + (rank + 1) * size
            held += [min(end, high) - max(start, low) for start, end in ranges if start < high and end > low]
        return held


def _buffer(weights: Sequence[Weight], ranks: int, distributed: bool) -> _Buffer:
    """Parameters from the last to the first; with the distributed optimizer each starts at a multiple of 64
    elements, a shared embedding fills a bucket of its own, and buckets end at a multiple of lcm(ranks, 128)."""
    buckets: list[tuple[tuple[int, int], ...]] = []
    ends: list[int] = []
    ranges: list[tuple[int, int]] = []
    at = 0

    def close() -> None:
        nonlocal at
        at = _round_up(at, lcm(ranks, _BUCKET_ALIGNMENT)) if distributed else at
        buckets.append(tuple(ranges))
        ends.append(at)
        ranges.clear()

    for weight in reversed(weights):
        own_bucket = weight.shared_embedding and distributed
        at = _round_up(at, _PARAMETER_ALIGNMENT) if distributed else at
        if own_bucket and ranges:
            close()
        ranges.append((at, at + weight.numel))
        at += weight.numel
        if own_bucket:
            close()
    if ranges:
        close()
    return _Buffer(tuple(buckets), tuple(ends))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def data_ranks(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Ranks over which dense gradients, and those of experts, are summed."""
    per_stage = world_size // parallel.pipeline
    return per_stage // parallel.tensor, per_stage // (parallel.expert * parallel.expert_tensor)


def state_bytes(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    position: Position,
    adam: Adam = "fused",
) -> StateBytes:
    """Bytes that the rank at `position` holds for the whole run."""
    return _state_bytes(architecture, model.dtype, model.train_router, parallel, world_size, position, adam)


@lru_cache(maxsize=4096)  # a search asks for the same layout beside many engines
def _state_bytes(
    architecture: Architecture,
    dtype: str,
    train_router: bool,
    parallel: ParallelConfig,
    world_size: int,
    position: Position,
    adam: Adam,
) -> StateBytes:
    width = DTYPE_BYTES[dtype]
    ranks, expert_ranks = data_ranks(parallel, world_size)
    parameters = gradients = optimizer = 0
    for chunk in range(parallel.virtual_pipeline):
        weights = chunk_weights(architecture, parallel, position.stage, chunk)
        trained = [weight for weight in weights if train_router or not weight.router]
        parameters += width * sum(weight.numel for weight in weights if weight.router and not train_router)
        for part, size, rank in (
            ([w for w in trained if not w.expert], ranks, position.data),
            ([w for w in trained if w.expert], expert_ranks, position.expert_data),
        ):
            buffer = _buffer(part, size, parallel.distributed_optimizer)
            parameters += width * buffer.numel
            gradients += GRADIENT_BYTES * buffer.numel
            held = buffer.shard(rank, size) if parallel.distributed_optimizer else [w.numel for w in part]
            optimizer += _adam_bytes(held, width, adam)
    return StateBytes(parameters, gradients, optimizer)


def _adam_bytes(held: Sequence[int], width: int, adam: Adam) -> int:
    master = 0 if width == 4 else 4
    return sum(held) * (MOMENT_BYTES + master) + (4 * len(held) if adam == "torch" else 0)
