"""Weights that tests publish, and what a run gives to its publisher."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.interfaces import LocalShard
from fiberpo_megatron.weight_sync.base import PublisherContext


class Tensors:
    """A source of given tensors: one process holds all of them."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = tensors

    def full(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors)

    def local(self) -> Iterator[LocalShard]:
        for name, tensor in self._tensors:
            yield LocalShard(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def context(
    engines: EnginePool, model: Path, run_folder: Path, rank: int = 0, world_size: int = 1, timeout_s: float = 30
) -> PublisherContext:
    return PublisherContext(engines, model, rank, world_size, run_folder, timeout_s)
