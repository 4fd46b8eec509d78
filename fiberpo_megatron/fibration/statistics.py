"""Collect the token statistics of a call: local sums per chunk, carried by the objective's own two reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fiberpo_megatron.fibration import histogram
from fiberpo_megatron.fibration.gates import GatedTree
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.objective_metrics import (
    ExpertMetrics,
    ObjectiveMetrics,
    RatioMetrics,
    TokenMetrics,
    level_metrics,
)
from fiberpo_megatron.fibration.rule import Chunk, GatedChunk
from fiberpo_megatron.fibration.runs import Runs
from fiberpo_megatron.fibration.tokens import MAX_LOG_RATIO


class TokenStatistics:
    """Collects what `ObjectiveMetrics` needs; `evaluate` sums the tables over ranks."""

    def __init__(
        self, local_max: float, runs: Runs, trajectories: int | None, share: Tensor | None, device: torch.device
    ) -> None:
        self.runs = runs
        self.share = share
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.counts = torch.zeros(histogram.BINS, dtype=torch.float64, device=device)
        self.clipped = torch.zeros(1, dtype=torch.float64, device=device)
        self.tokens_of = self.clipped_of = None
        if trajectories is not None:
            self.tokens_of = torch.zeros(trajectories, dtype=torch.float64, device=device)
            self.clipped_of = torch.zeros_like(self.tokens_of)
        self.local_max = local_max
        self.first_sums: dict[str, Tensor] = {}

    def first(self, chunk: Chunk) -> None:
        """Add up what needs only the inputs."""
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
        parts += [weighted.sum(dtype=wide), self._square(weighted, chunk.ratio), entropy]
        tokens = None if self.tokens_of is None else _per_run(chunk, chunk.counted)
        self.sums += torch.stack(parts)
        self.counts += histogram.histogram(x)
        if self.tokens_of is not None and tokens is not None:
            self.tokens_of.index_add_(0, self.runs.ids[TRAJECTORY_KEY][chunk.runs.rows], tokens)

    def _square(self, weighted: Tensor, ratio: Tensor) -> Tensor:
        """The sum of mu r^2, whose terms overflow float32 where r is above exp(44)."""
        if self.local_max > MAX_LOG_RATIO:
            weighted, ratio = weighted.double(), ratio.double()
        return weighted.mul_(ratio).sum(dtype=torch.float64)

    def first_tables(self) -> dict[str, Tensor]:
        tables = {"sums": self.sums, "log_ratio_histogram": self.counts}
        return tables if self.tokens_of is None else {**tables, "trajectory_tokens": self.tokens_of}

    def after_first(self, reduced: dict[str, Tensor]) -> None:
        """Take the global first sums."""
        self.first_sums = reduced

    def second(self, chunk: Chunk, gated: GatedChunk) -> None:
        """Count clipped tokens."""
        clipped = torch.zeros_like(chunk.weights) if gated.free is None else chunk.only_counted(1.0 - gated.free)
        per_run = None if self.clipped_of is None else _per_run(chunk, clipped)
        self.clipped += clipped.sum(dtype=torch.float64)
        if self.clipped_of is not None and per_run is not None:
            self.clipped_of.index_add_(0, self.runs.ids[TRAJECTORY_KEY][chunk.runs.rows], per_run)

    def second_tables(self, value: Tensor) -> dict[str, Tensor]:
        top = histogram.top_bin(self.first_sums["log_ratio_histogram"])
        fine = histogram.fine_position(self.local_max, top).to(value.device)
        tables = {"clipped": self.clipped, "value": value.reshape(1), "max": fine}
        return tables if self.clipped_of is None else {**tables, "trajectory_clipped": self.clipped_of}


def summarise(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    gated_tree: GatedTree | None,
    experts: NodeMap | None,
    *,
    only_max: float | None,
) -> ObjectiveMetrics:
    """Return the metrics from the global sums of both reductions.

    `experts` are the nodes of an objective with expert partitions. `only_max` is the largest log ratio when there is no
    other rank, so that the maximum is exact.
    """
    count, ratio, weight, weighted, square, entropy = first["sums"].tolist()
    counts = first["log_ratio_histogram"]
    tokens = max(count, 1.0)
    none, some, every = _trajectory_shares(first.get("trajectory_tokens"), second.get("trajectory_clipped"))
    top = only_max
    if top is None:
        top = histogram.refined_maximum(histogram.top_bin(counts), second["max"].cpu())
    return ObjectiveMetrics(
        value=float(second["value"]),
        effective_sample_size=weighted * weighted / (weight * square) if weight * square > 0 else 0.0,
        ratio=RatioMetrics(
            mean=ratio / tokens,
            p99=math.exp(min(top, histogram.quantile(counts, 0.99))) if count else 0.0,
            max=math.exp(top) if count else 0.0,
        ),
        token=TokenMetrics(count, weight, float(second["clipped"]) / tokens, none, some, every),
        levels=() if gated_tree is None else level_metrics(gated_tree),
        expert=None if experts is None else _expert_metrics(first["nodes"], experts, entropy, weight),
    )


def _trajectory_shares(
    tokens_of: Tensor | None, clipped: Tensor | None
) -> tuple[float | None, float | None, float | None]:
    if clipped is None or tokens_of is None:
        return None, None, None
    held = tokens_of > 0
    size = max(1, int(held.sum()))
    none = int((held & (clipped == 0)).sum())
    every = int((held & (clipped == tokens_of)).sum())
    return none / size, (int(held.sum()) - none - every) / size, every / size


def _per_run(chunk: Chunk, value: Tensor | None) -> Tensor:
    return chunk.runs.lengths.double() if value is None else chunk.runs.sums(value)


def _expert_metrics(sums: Tensor, nodes: NodeMap, entropy: float, weight: float) -> ExpertMetrics:
    if nodes.expert_nodes is not None:  # other branches of the tree have none
        sums = sums.index_select(1, nodes.expert_nodes.to(sums.device))
        weight = float(sums[0].sum())
    mass, _, plus, minus = sums.sum(1)
    drift = (plus + minus) / mass.clamp(min=torch.finfo(torch.float64).tiny)
    total = max(weight, torch.finfo(torch.float64).tiny)
    return ExpertMetrics(tuple((mass / total).tolist()), tuple(drift.tolist()), entropy / total)
