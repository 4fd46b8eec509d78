"""Token statistics of a call: local sums per chunk, carried by the objective's own two reductions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fiberpo_megatron.fibration import histogram
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.metrics import (
    ExpertMetrics,
    ObjectiveMetrics,
    RatioMetrics,
    TokenMetrics,
    level_metrics,
)
from fiberpo_megatron.fibration.rule import Chunk, GatedChunk, Gating
from fiberpo_megatron.fibration.runs import Runs
from fiberpo_megatron.fibration.tokens import TokenBatch


class TokenStatistics:
    """Collects what `ObjectiveMetrics` needs; tables are summed over ranks by the engine."""

    def __init__(self, batch: TokenBatch, runs: Runs, trajectories: int | None, share: Tensor | None) -> None:
        device = batch.log_ratio.device
        self.batch = batch
        self.runs = runs
        self.share = share
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.counts = torch.zeros(histogram.BINS, dtype=torch.float64, device=device)
        self.clipped = torch.zeros(1, dtype=torch.float64, device=device)
        self.tokens_of = self.clipped_of = None
        if trajectories is not None:
            self.tokens_of = torch.zeros(trajectories, dtype=torch.float64, device=device)
            self.clipped_of = torch.zeros_like(self.tokens_of)
        self.local_max = batch.max_log_ratio
        self.top = -1

    def first(self, chunk: Chunk) -> None:
        """Sums that need only the inputs."""
        x, ratio, mu = chunk.log_ratio, chunk.ratio, chunk.weights
        weighted = ratio * mu
        counted = float(x.shape[0])
        if chunk.any_weightless:
            held = mu > 0
            x, ratio, counted = x[held], ratio[held], float(held.sum())
        entropy = weighted.new_zeros((), dtype=torch.float64)
        if self.share is not None:
            share = self.share[chunk.tokens]
            log_share = share.clamp(min=torch.finfo(share.dtype).tiny).log_()
            entropy = -(mu @ log_share.mul_(share)).sum(dtype=torch.float64)
        wide = torch.float64
        parts = [mu.new_tensor(counted, dtype=wide), ratio.sum(dtype=wide), mu.sum(dtype=wide)]
        parts += [weighted.sum(dtype=wide), weighted.mul_(chunk.ratio).sum(dtype=wide), entropy]
        tokens = None if self.tokens_of is None else _per_run(chunk, chunk.counted)
        self.add_first(torch.stack(parts), histogram.histogram(x), tokens, chunk.runs.rows)

    def add_first(self, sums: Tensor, counts: Tensor, tokens: Tensor | None, runs: slice) -> None:
        """Sums of tokens that count, r, mu, mu r, mu r^2 and mu H(omega), [6]; histogram counts [BINS]; tokens that
        count per run of `runs`, all but these in float64."""
        self.sums += sums
        self.counts += counts
        if self.tokens_of is not None and tokens is not None:
            self.tokens_of.index_add_(0, self.runs.ids[TRAJECTORY_KEY][runs], tokens)

    def first_tables(self) -> dict[str, Tensor]:
        tables = {"sums": self.sums, "log_ratio_histogram": self.counts}
        return tables if self.tokens_of is None else {**tables, "trajectory_tokens": self.tokens_of}

    def after_first(self, reduced: dict[str, Tensor]) -> None:
        """Take the global first sums."""
        self.sums, self.counts = reduced["sums"], reduced["log_ratio_histogram"]
        self.tokens_of = reduced.get("trajectory_tokens")
        self.top = histogram.top_bin(self.counts)

    def second(self, chunk: Chunk, gated: GatedChunk) -> None:
        """Count clipped tokens."""
        clipped = chunk.only_counted(1.0 - gated.free)
        per_run = None if self.clipped_of is None else _per_run(chunk, clipped)
        self.add_second(clipped.sum(dtype=torch.float64), per_run, chunk.runs.rows)

    def add_second(self, total: Tensor, clipped: Tensor | None, runs: slice) -> None:
        """Clipped tokens in all, and per run of `runs`; float64."""
        self.clipped += total
        if self.clipped_of is not None and clipped is not None:
            self.clipped_of.index_add_(0, self.runs.ids[TRAJECTORY_KEY][runs], clipped)

    def second_tables(self, value: Tensor) -> dict[str, Tensor]:
        fine = histogram.fine_position(self.local_max, self.top).to(value.device)
        tables = {"clipped": self.clipped, "value": value.reshape(1), "max": fine}
        return tables if self.clipped_of is None else {**tables, "trajectory_clipped": self.clipped_of}

    def metrics(
        self,
        gating: Gating,
        reduced: dict[str, Tensor],
        nodes: NodeMap | None,
        sums: Tensor | None,
        *,
        alone: bool,
    ) -> ObjectiveMetrics:
        """Metrics from the global sums; `alone` when there is no other rank, so that the maximum is exact."""
        count, ratio, weight, weighted, square, entropy = self.sums.tolist()
        tokens = max(count, 1.0)
        none, some, every = self._trajectory_shares(reduced.get("trajectory_clipped"))
        top = self.local_max if alone else histogram.refined_maximum(self.top, reduced["max"].cpu())
        return ObjectiveMetrics(
            value=float(reduced["value"]),
            effective_sample_size=weighted * weighted / (weight * square) if weight * square > 0 else 0.0,
            ratio=RatioMetrics(
                mean=ratio / tokens,
                p99=math.exp(min(top, histogram.quantile(self.counts, 0.99))) if count else 0.0,
                max=math.exp(top) if count else 0.0,
            ),
            token=TokenMetrics(count, weight, float(reduced["clipped"]) / tokens, none, some, every),
            levels=() if gating.gated_tree is None else level_metrics(gating.gated_tree),
            expert=None if self.share is None or sums is None else _expert_metrics(sums, entropy, weight),
        )

    def _trajectory_shares(self, clipped: Tensor | None) -> tuple[float | None, float | None, float | None]:
        if clipped is None or self.tokens_of is None:
            return None, None, None
        held = self.tokens_of > 0
        size = max(1, int(held.sum()))
        none = int((held & (clipped == 0)).sum())
        every = int((held & (clipped == self.tokens_of)).sum())
        return none / size, (int(held.sum()) - none - every) / size, every / size


def _per_run(chunk: Chunk, value: Tensor | None) -> Tensor:
    return chunk.runs.lengths.double() if value is None else chunk.runs.sums(value)


def _expert_metrics(sums: Tensor, entropy: float, weight: float) -> ExpertMetrics:
    mass, _, plus, minus = sums.sum(1)
    drift = (plus + minus) / mass.clamp(min=torch.finfo(torch.float64).tiny)
    total = max(weight, torch.finfo(torch.float64).tiny)
    return ExpertMetrics(tuple((mass / total).tolist()), tuple(drift.tolist()), entropy / total)
