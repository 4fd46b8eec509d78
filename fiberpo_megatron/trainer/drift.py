"""This module splits how far the policy is from what sampled the tokens by its causes: mismatch of engine and trainer,
older weights of the engine, and the optimiser steps on a batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.importance import ENGINE_KEY, VERSION_KEY
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.types import TokenScores

Cell = tuple[int, int]
"""(number of an engine, lag of a version), each -1 where it is not known."""


@dataclass(frozen=True)
class SamplingDrift:
    """Holds how far the trainer's log-probs are from those with which tokens were sampled: |y| with y = log pi_old -
    log mu, over all mini-batches and ranks."""

    cells: Mapping[Cell, tuple[float, int]]
    """Sum of |y| in nats, and number of tokens, by engine and lag; cells without tokens are left out."""
    largest: float
    """Largest |y| of a token."""
    entropy: float
    """Mean entropy of the trainer's next-token distributions, in nats."""

    def metrics(self) -> dict[str, float]:
        """Return `entropy`, and the means of |y|: of all tokens, of those that the trainer's own weights sampled (or
        weights whose version is not known), of those that older ones sampled; and by lag and engine where there are
        several.

        That of an engine is about its tokens of the trainer's own weights, so that it is mismatch alone.
        """
        lags, engines = (sorted({cell[place] for cell in self.cells}) for place in (1, 0))
        found = {"rollout_diff/mean": self._mean(lags, engines), "rollout_diff/max": self.largest}
        found["drift/mismatch"] = self._mean([lag for lag in lags if lag <= 0], engines)
        found["drift/staleness"] = self._mean([lag for lag in lags if lag > 0], engines)
        if lags and lags[-1] > 0:
            found |= {f"drift/lag/{_name(lag)}": self._mean([lag], engines) for lag in lags}
        if len(engines) > 1:
            found |= {f"drift/engine/{_name(engine)}": self._mean([0], [engine]) for engine in engines}
        return {"entropy": self.entropy} | {name: value for name, value in found.items() if value is not None}

    def mismatch(self) -> dict[int, tuple[float, int]]:
        """Return, by known engine, the mean |y| of its tokens that the trainer's own weights sampled, and their
        number."""
        found = {engine: self.cells[engine, 0] for engine, lag in sorted(self.cells) if engine >= 0 and lag == 0}
        return {engine: (total / tokens, tokens) for engine, (total, tokens) in found.items()}

    def _mean(self, lags: Sequence[int], engines: Sequence[int]) -> float | None:
        chosen = [value for (engine, lag), value in self.cells.items() if engine in engines and lag in lags]
        tokens = sum(count for _, count in chosen)
        return sum(total for total, _ in chosen) / tokens if tokens else None


def sampling_drift(
    layout: Layout, parts: Sequence[MiniBatch], scores: Sequence[TokenScores | None]
) -> SamplingDrift | None:
    """Return how far the trainer is from what sampled the mini-batches' tokens, in one sum and one maximum over ranks.

    `scores` are the trainer's, of each part before the first optimiser step. Every rank of the last pipeline stage
    calls it; other ranks have no scores and get None.
    """
    known = [(part, found.log_probs) for part, found in zip(parts, scores, strict=True) if found is not None]
    if not known:
        return None
    entropy = torch.cat([found.entropy for found in scores if found is not None]).double()
    cells = sorted({cell for part, _ in known for cell in _cells(part)})  # equal on all ranks, as labels are
    sums = known[0][1].new_zeros(2, len(cells), dtype=torch.float64)
    largest = known[0][1].new_zeros(1)
    for part, log_probs in known:
        engine, version = (part.keys[key].cpu() for key in (ENGINE_KEY, VERSION_KEY))
        own = torch.tensor([cells.index(cell) for cell in _cells(part)])
        cell = own[engine * len(part.labels[VERSION_KEY]) + version].to(
            log_probs.device
        )  # one upload in place of three
        y = (log_probs - part.rollout_log_probs.to(log_probs.device)).abs()
        largest = torch.cat([largest, y]).max().reshape(1)
        sums[0].index_add_(0, cell, y.double())
        sums[1].index_add_(0, cell, torch.ones_like(y).double())
    nats, *flat = layout.sum_over_tokens(torch.cat([entropy.sum().reshape(1), sums.flatten()])).tolist()
    totals, counts = flat[: len(cells)], flat[len(cells) :]
    found = {cell: (total, int(count)) for cell, total, count in zip(cells, totals, counts, strict=True) if count}
    return SamplingDrift(found, layout.max_over_tokens(largest).item(), nats / sum(counts))


def _cells(part: MiniBatch) -> Iterator[Cell]:
    """Yield the cell of every pair of ids of a mini-batch, by engine, then by version."""
    lags = part.labels[VERSION_KEY].tolist()
    return ((engine, lag) for engine in part.labels[ENGINE_KEY].tolist() for lag in lags)


def optimiser_drift(layout: Layout, steps: Sequence[tuple[Sequence[Tensor], Tensor]]) -> dict[str, float]:
    """Return `drift/optimiser_steps`, the mean |log ratio| of a token to the policy before the first optimiser step, in
    nats over all ranks.

    `steps` are, of each optimiser step, the log-probs that its gate saw, in order, and the old ones [n]. Every rank of
    the last pipeline stage calls it; other ranks' gates saw nothing, and they get an empty result.
    """
    if not any(seen for seen, _ in steps):
        return {}
    moved = torch.cat([(torch.cat(list(seen)) - old.to(seen[0].device)).abs().double() for seen, old in steps])
    total, tokens = layout.sum_over_tokens(torch.stack([moved.sum(), moved.new_tensor(float(len(moved)))])).tolist()
    return {"drift/optimiser_steps": total / tokens}


def _name(number: int) -> str:
    return "unknown" if number < 0 else str(number)
