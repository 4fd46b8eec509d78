"""This module runs an objective as several ranks would, in one process: each rank is a thread with its own tokens.

One thread runs at a time, the others wait for their turn or in a reduction: several would only contend for Python's
lock, and Triton's interpreter cannot run in two threads at once.
"""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fiberpo_megatron.fibration import Objective, ObjectiveOutput
from fiberpo_megatron.trainer.step_file import Tokens

WAIT_S = 300.0
"""Seconds that a rank waits in a reduction for the others, which compute in the same process."""


class Sum:
    """Adds up flat float64 tensors of `size` threads, as an all-reduce of that many ranks does.

    A network adds in an order of its own; `seed` chooses the order here.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self._tensors: list[Tensor] = [torch.empty(0)] * size
        self._order = random.Random(seed).sample(range(size), size)
        self._barrier = threading.Barrier(size, timeout=WAIT_S)
        self.turn = threading.Lock()
        """Lock that a rank holds while it runs, and gives up while it waits for the others."""

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        """Return the reduction that one rank calls.

        The rank holds `turn`. Raises ValueError when ranks pass tensors of different sizes, and BrokenBarrierError when
        another rank failed or did not come within WAIT_S seconds.
        """

        def reduce(tensor: Tensor) -> Tensor:
            self._tensors[rank] = tensor
            self._wait()
            sizes = {len(one) for one in self._tensors}
            if len(sizes) > 1:
                raise ValueError(f"ranks reduce tensors of different sizes: {sorted(sizes)}; pass the same `counts`")
            total = torch.zeros_like(tensor)
            for other in self._order:
                total += self._tensors[other]
            self._wait()
            return total

        return reduce

    def _wait(self) -> None:
        self.turn.release()
        try:
            self._barrier.wait()
        finally:
            self.turn.acquire()

    def abort(self) -> None:
        """Let every rank that waits, or will wait, raise."""
        self._barrier.abort()


def run_ranks(
    objective: Objective, tokens: Tokens, parts: Sequence[Tensor], *, metrics: bool = True, seed: int = 0
) -> list[ObjectiveOutput]:
    """Return one output per rank, whose tokens are those at `parts[rank]`, int64 [n] each.

    Raises the error of the first rank that failed.
    """
    total = Sum(len(parts), seed)

    def rank_call(rank: int) -> ObjectiveOutput:
        try:
            with total.turn:
                return tokens.take(parts[rank]).call(objective, total.of(rank), metrics)
        except BaseException:
            total.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(rank_call, rank) for rank in range(len(parts))]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]


def in_order(values: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return values per rank, [n] each, in the order of the whole batch."""
    joined = torch.cat(list(values))
    return torch.empty_like(joined).index_copy_(0, torch.cat(list(parts)).to(joined.device), joined)
