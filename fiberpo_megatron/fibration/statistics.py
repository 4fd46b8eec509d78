"""Collect the token statistics of a call: local sums per chunk, carried by the objective's own two reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fiberpo_megatron.fibration import histogram
from fiberpo_megatron.fibration.exact import WEIGHT, Range, Totals, decode_totals, sum_by_index
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
from fiberpo_megatron.fibration.rule import Chunk, GatedChunk, Rule
from fiberpo_megatron.fibration.runs import Runs
from fiberpo_megatron.fibration.tokens import MAX_LOG_RATIO
from fiberpo_megatron.fibration.tree import NODE_RANGES

RATIO, MU, WEIGHTED, SQUARE, ENTROPY = range(5)
"""The sums of a call's tokens: of r, mu, mu r, mu r^2, and of mu times the entropy of omega."""


def statistic_ranges(rule: Rule) -> tuple[Range, ...]:
    """Return the ranges of the five sums; an entropy is at most the log of 2^24 partitions."""
    largest = math.exp(rule.max_log_ratio)
    ratio = Range.covering(largest)
    return ratio, WEIGHT, ratio, Range.covering(largest**2), Range.covering(math.log(2.0**24))


class TokenStatistics:
    """Collects what `ObjectiveMetrics` needs; `evaluate` sums the tables over ranks."""

    def __init__(
        self,
        rule: Rule,
        local_max: float,
        runs: Runs,
        trajectories: int | None,
        share: Tensor | None,
        device: torch.device,
    ) -> None:
        self.runs = runs
        self.share = share
        self.sums = Totals(statistic_ranges(rule), device)
        self.counts = torch.zeros(histogram.BINS, dtype=torch.float64, device=device)
        self.clipped = torch.zeros(1, dtype=torch.float64, device=device)
        self.tokens_of = self.clipped_of = None
        if trajectories is not None:
            self.tokens_of = torch.zeros(trajectories, dtype=torch.float64, device=device)
            self.clipped_of = torch.zeros_like(self.tokens_of)
        self.widest, self.local_max = rule.max_log_ratio, local_max
        self.first_sums: dict[str, Tensor] = {}

    def first(self, chunk: Chunk) -> None:
        """Add up what needs only the inputs."""
        x, ratio, mu = chunk.log_ratio, chunk.ratio, chunk.weights
        weighted = ratio * mu
        if self.share is not None:
            share = self.share[chunk.tokens]
            log_share = share.clamp(min=torch.finfo(share.dtype).tiny).log_()
            self.sums.add(ENTROPY, log_share.mul_(share).sum(1).mul_(mu).neg_())
        self.sums.add(SQUARE, self._square(weighted, ratio))
        self.sums.add(WEIGHTED, weighted)
        self.sums.add(MU, mu)
        if chunk.any_weightless:
            held = mu > 0
            x, ratio = x[held], ratio[held]
        self.sums.add(RATIO, ratio)
        tokens = None if self.tokens_of is None else _per_run(chunk, chunk.counted)
        self.counts += histogram.histogram(x)
        if self.tokens_of is not None and tokens is not None:
            self.tokens_of.index_add_(0, self.runs.ids[TRAJECTORY_KEY][chunk.runs.rows], tokens)

    def _square(self, weighted: Tensor, ratio: Tensor) -> Tensor:
        """Return mu r^2. Its terms overflow float32 where r is above exp(44): wherever that can be, they are float64,
        so that a token's bits do not depend on the others."""
        if self.widest > MAX_LOG_RATIO:
            weighted, ratio = weighted.double(), ratio.double()
        return weighted * ratio

    def first_tables(self) -> dict[str, Tensor]:
        tables = {"sums": self.sums.to_send(), "log_ratio_histogram": self.counts}
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

    def second_tables(self, value: Totals) -> dict[str, Tensor]:
        top = histogram.top_bin(self.first_sums["log_ratio_histogram"])
        fine = histogram.fine_position(self.local_max, top).to(self.clipped.device)
        tables = {"clipped": self.clipped, "value": value.to_send(), "max": fine}
        return tables if self.clipped_of is None else {**tables, "trajectory_clipped": self.clipped_of}


def summarise(
    rule: Rule,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    gated_tree: GatedTree | None,
    experts: NodeMap | None,
) -> ObjectiveMetrics:
    """Return the metrics from the global sums of both reductions.

    `experts` are the nodes of an objective with expert partitions.
    """
    ratio, weight, weighted, square, entropy = decode_totals(first["sums"], statistic_ranges(rule))
    counts = first["log_ratio_histogram"]
    count = float(counts.sum())
    tokens = max(count, 1.0)
    none, some, every = _trajectory_shares(first.get("trajectory_tokens"), second.get("trajectory_clipped"))
    top = histogram.refined_maximum(histogram.top_bin(counts), second["max"].cpu())
    return ObjectiveMetrics(
        value=decode_totals(second["value"], (rule.value_range,))[0],
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
    return chunk.runs.lengths.double() if value is None else chunk.runs.sums(value.double())


def _expert_metrics(sums: Tensor, nodes: NodeMap, entropy: float, weight: float) -> ExpertMetrics:
    if nodes.expert_nodes is not None:  # other branches of the tree have none
        sums = sums.index_select(1, nodes.expert_nodes.to(sums.device))
    # A plain sum's order would depend on the number of nodes without tokens, which differs with the number of ranks.
    one_node = sums.new_zeros(sums.shape[1], dtype=torch.int64)
    rows = zip(sums, NODE_RANGES, strict=True)
    mass, _, plus, minus = (sum_by_index(row.t(), one_node, 1, (it,) * row.shape[1])[:, 0] for row, it in rows)
    drift = (plus + minus) / mass.clamp(min=torch.finfo(torch.float64).tiny)
    if nodes.expert_nodes is not None:
        weight = float(mass.sum())
    total = max(weight, torch.finfo(torch.float64).tiny)
    return ExpertMetrics(tuple((mass / total).tolist()), tuple(drift.tolist()), entropy / total)
