"""Weights that tests publish, and what a run gives to its publisher."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.interfaces import LocalShard, NamedShape
from fiberpo_megatron.weight_sync.base import PublisherContext


class Tensors:
    """A source of given tensors, which are spread in turn over `ranks` processes. An iterator is used up once."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], rank: int = 0, ranks: int = 1) -> None:
        self._tensors, self._rank, self._ranks = list(tensors), rank, ranks

    def rounds(self, limit: int) -> list[list[list[NamedShape]]]:
        found: list[list[list[NamedShape]]] = []
        for number, (name, tensor) in enumerate(self._tensors):
            if number % self._ranks == 0 and (not found or found[-1][0] and self._size(found[-1]) >= limit):
                found.append([[] for _ in range(self._ranks)])
            found[-1][number % self._ranks].append(NamedShape(name, tuple(tensor.shape), tensor.dtype))
        return found

    def _size(self, of_ranks: list[list[NamedShape]]) -> int:
        return sum(one.nbytes for mine in of_ranks for one in mine)

    def share(self, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        tensors = dict(self._tensors)
        for of_ranks in self.rounds(limit):
            yield [(one.name, tensors[one.name]) for one in of_ranks[self._rank]]

    def full(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors)

    def local(self) -> Iterator[LocalShard]:
        for name, tensor in self._tensors:
            yield LocalShard(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def context(
    engines: EnginePool, model: Path, run_folder: Path, rank: int = 0, world_size: int = 1, timeout_s: float = 30
) -> PublisherContext:
    return PublisherContext(engines, model, rank, world_size, run_folder, timeout_s)
