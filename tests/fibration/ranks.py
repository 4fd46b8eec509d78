"""Ranks as threads: each runs the same call on its own tokens; `reduce` sums and counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fiberpo_megatron.fibration import Objective, ObjectiveOutput
from tests.fibration.oracle import Case


@dataclass
class Collective:
    """A summing all-reduce between `size` threads; refuses tensors that differ in shape or dtype."""

    size: int
    sizes: list[int] = field(default_factory=list)
    """Bytes of each call, as rank 0 saw them."""

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)
        self.tensors: list[Tensor | None] = [None] * self.size
        self.calls = [0] * self.size

    def reduce_of(self, rank: int, *, in_place: bool = False) -> Callable[[Tensor], Tensor | None]:
        def reduce(tensor: Tensor) -> Tensor | None:
            assert tensor.dtype == torch.float64 and tensor.dim() == 1
            self.calls[rank] += 1
            if rank == 0:
                self.sizes.append(tensor.numel() * 8)
            self.tensors[rank] = tensor.clone()
            self.barrier.wait()
            parts = [part for part in self.tensors if part is not None]
            assert len({part.shape for part in parts}) == 1, "ranks disagree on table sizes"
            total = torch.stack(parts).sum(0)
            self.barrier.wait()
            if in_place:
                tensor.copy_(total)
                return None
            return total

        return reduce


def run_ranks(
    objective: Objective, case: Case, parts: Sequence[Tensor], *, in_place: bool = False, **options
) -> tuple[list[ObjectiveOutput], Collective]:
    """One call per part of the tokens; raises the first rank's error after all ranks have ended."""
    collective = Collective(len(parts))

    def rank_call(rank: int) -> ObjectiveOutput:
        return case.call(objective, parts[rank], reduce=collective.reduce_of(rank, in_place=in_place), **options)

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(rank_call, rank) for rank in range(len(parts))]
        errors = [future.exception() for future in futures]
    if any(errors):
        raise next(error for error in errors if error is not None)
    return [future.result() for future in futures], collective


def joined(outputs: Sequence[ObjectiveOutput], parts: Sequence[Tensor], name: str) -> Tensor:
    """A per-token result of all ranks in the order of the whole batch."""
    values = torch.cat([getattr(out, name) for out in outputs])
    return torch.empty_like(values).index_copy_(0, torch.cat(list(parts)), values)
