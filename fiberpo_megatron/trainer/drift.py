"""This module splits how far the policy is from what sampled the tokens by its causes: mismatch of engine and trainer,
older weights of the engine, and the optimiser steps on a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.types import TokenScores


def drift_metrics(
    layout: Layout,
    parts: Sequence[MiniBatch],
    scores: Sequence[TokenScores | None],
    steps: Sequence[tuple[Sequence[Tensor], Tensor]],
) -> dict[str, float]:
    """Return the mean |difference of log-probs| of a token by cause, over all ranks' tokens, in nats.

    `drift/mismatch` compares engine and trainer on tokens that were sampled with the trainer's own weights, or with
    weights whose version is not known; `drift/staleness` on those that older weights sampled, where there are any.
    `drift/optimiser_steps` compares the policy at each optimiser step with that before the first.

    Args:
        parts, scores: the mini-batches, and the trainer's scores of each before the first optimiser step.
        steps: of each optimiser step the log-probs that its gate saw, in order, and the old ones [n].

    Every rank of the last pipeline stage calls it; other ranks have no scores and get an empty result.
    """
    known = [(part, found.log_probs) for part, found in zip(parts, scores, strict=True) if found is not None]
    if not known:
        return {}
    sums = known[0][1].new_zeros(6, dtype=torch.float64)
    for part, log_probs in known:
        difference = (log_probs - part.rollout_log_probs.to(log_probs.device)).abs().double()
        lags = part.labels["weight_version"][part.keys["weight_version"]].to(log_probs.device)
        stale = (lags > 0).double()
        sums += torch.stack([*_sums(difference, 1.0 - stale), *_sums(difference, stale), *sums.new_zeros(2)])
    for seen, old in steps:
        moved = (torch.cat(list(seen)) - old.to(seen[0].device)).abs().double()
        sums[4:] += torch.stack(_sums(moved, torch.ones_like(moved)))
    totals = layout.sum_over_tokens(sums).tolist()
    names = ("drift/mismatch", "drift/staleness", "drift/optimiser_steps")
    pairs = zip(names, totals[::2], totals[1::2], strict=True)
    return {name: total / tokens for name, total, tokens in pairs if tokens}


def _sums(values: Tensor, counted: Tensor) -> list[Tensor]:
    """Return the sum of the values that count, and their number."""
    return [(values * counted).sum(), counted.sum()]
