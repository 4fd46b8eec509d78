"""This module computes the bytes of parameters, gradients and optimizer state on one rank, as Megatron has them.

The rules come from `_ParamAndGradBuffer` (distributed/param_and_grad_buffer.py) for buffers and their padding, from
`DistributedOptimizer` (optimizer/distrib_optimizer.py) for the shards, and from `mcore/optimizers/build.py` for the
settings: gradients are float32 and nothing overlaps, so that a buffer has one bucket. What an optimizer keeps for a
parameter, it says itself (`Optimizer.state_bytes`). tests/planning/test_states.py counts the tensors of real ranks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod

from fiberpo_megatron.mcore.families import Architecture
from fiberpo_megatron.mcore.optimizers import Optimizer
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.planning.parameters import Weight, chunk_weights

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
Shape = tuple[int, ...]
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Position:
    """Says where a rank stands, as far as its memory depends on it."""

    stage: int
    """Pipeline stage."""
    data: int = 0
    """Rank among the data x context ranks."""
    expert_data: int = 0
    """Rank among the expert-data-parallel ranks."""


@dataclass(frozen=True)
class StateBytes:
    """Holds the bytes that live as long as the run."""

    parameters: int
    gradients: int
    optimizer: int
    """Float32 master weights where the parameters are bfloat16, and the optimizer's own state."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class _Buffer:
    """Describes one contiguous gradient buffer: its buckets of [start, end) parameter ranges."""

    buckets: tuple[tuple[tuple[int, int], ...], ...]
    ends: tuple[int, ...]
    """Padded end of each bucket."""

    @property
    def numel(self) -> int:
        return self.ends[-1] if self.ends else 0

    def shard(self, rank: int, ranks: int) -> list[int]:
        """Return how many elements of each parameter the shard of `rank` holds; parameters without any are left out."""
        held = []
        for index, ranges in enumerate(self.buckets):
            begin = self.ends[index - 1] if index else 0
            size = (self.ends[index] - begin) // ranks
            low, high = begin + rank * size, begin + (rank + 1) * size
            held += [min(end, high) - max(start, low) for start, end in ranges if start < high and end > low]
        return held


def _buffer(weights: Sequence[Weight], ranks: int, distributed: bool) -> _Buffer:
    """Return the buffer of these parameters, the last one first.

    With the distributed optimizer each parameter starts at a multiple of 64 elements, a shared embedding fills a bucket
    of its own, and buckets end at a multiple of lcm(ranks, 128).
    """
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
    """Return the number of ranks over which dense gradients, and those of experts, are summed."""
    per_stage = world_size // parallel.pipeline
    return per_stage // parallel.tensor, per_stage // (parallel.expert * parallel.expert_tensor)


def state_bytes(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    position: Position,
    optimizer: Optimizer,
) -> StateBytes:
    """Return the bytes that the rank at `position` holds for the whole run."""
    parameters, gradients, held = _tensors(
        architecture, model.dtype, model.train_router, parallel, world_size, position
    )
    master = 0 if model.dtype == "float32" else 4
    state = sum(count * (optimizer.state_bytes(shape) + master * prod(shape)) for shape, count in held.items())
    return StateBytes(parameters, gradients, state)


@lru_cache(maxsize=4096)  # a search asks for the same layout beside many engines
def _tensors(
    architecture: Architecture,
    dtype: str,
    train_router: bool,
    parallel: ParallelConfig,
    world_size: int,
    position: Position,
) -> tuple[int, int, Counter[Shape]]:
    """Return the bytes of parameters and gradients, and how many tensors of each shape the optimizer updates."""
    width = DTYPE_BYTES[dtype]
    ranks, expert_ranks = data_ranks(parallel, world_size)
    parameters = gradients = 0
    held: Counter[Shape] = Counter()
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
            if parallel.distributed_optimizer:
                held.update((elements,) for elements in buffer.shard(rank, size))
            else:
                held.update(weight.shape for weight in part)
    return parameters, gradients, held
