"""One objective call: three passes over this rank's tokens with two fused reductions between them.

pass 1: node sums and statistics  -> reduce -> gates on nodes
pass 2: gated ratio, direct gradient, adjoint sums -> reduce -> adjoints on nodes
pass 3: the gradient that reaches tokens through aggregates (skipped while it is zero)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fiberpo_megatron.fibration.collective import Reduce, fused_sum
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.membership import NodeMap, make_node_map
from fiberpo_megatron.fibration.metrics import ObjectiveMetrics
from fiberpo_megatron.fibration.passes import GatedTokens, choose_passes
from fiberpo_megatron.fibration.rule import Gating, Rule
from fiberpo_megatron.fibration.runs import Runs, find_runs
from fiberpo_megatron.fibration.statistics import TokenStatistics
from fiberpo_megatron.fibration.tokens import MAX_LOG_RATIO, TokenBatch, table_size
from fiberpo_megatron.fibration.tree import parent_tables


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns."""

    gated_ratio: Tensor
    """G, [N], in log_ratio's dtype."""
    gradient: Tensor
    """c = dJ/d log_ratio, [N], in log_ratio's dtype: maximise J by minimising -sum_j c_j log pi(a_j)."""
    value: Tensor
    """This rank's share of J, a float64 scalar; the shares sum to J."""
    metrics: ObjectiveMetrics | None
    """Global metrics; None when the call asked for none."""


def evaluate(
    rule: Rule, batch: TokenBatch, reduce: Reduce | None, *, with_metrics: bool, kernels: bool | None
) -> ObjectiveOutput:
    """Run an objective on this rank's tokens."""
    call = _Call(rule, batch, reduce, with_metrics=with_metrics, kernels=kernels)
    gating, node_sums = call.first_pass()
    gated, reduced = call.second_pass(gating)
    call.third_pass(gating, reduced, gated.gradient)
    metrics = None
    if call.statistics is not None:
        metrics = call.statistics.metrics(gating, reduced, call.nodes, node_sums, alone=reduce is None)
    return ObjectiveOutput(gated.ratio, gated.gradient, gated.value, metrics)


class _Call:
    def __init__(
        self, rule: Rule, batch: TokenBatch, reduce: Reduce | None, *, with_metrics: bool, kernels: bool | None
    ) -> None:
        self.rule, self.batch, self.reduce = rule, batch, reduce
        keys = (*rule.base_keys, *rule.parent_keys)
        by_trajectory = with_metrics and TRAJECTORY_KEY in batch.ids
        seen = (*keys, TRAJECTORY_KEY) if by_trajectory and TRAJECTORY_KEY not in keys else keys
        passes = choose_passes(rule, batch, kernels)
        self.runs: Runs = find_runs(batch, seen, chunk=passes.chunk(batch))
        shared = reduce is not None
        self.nodes: NodeMap | None = None
        if rule.has_nodes:
            self.nodes = make_node_map(batch, self.runs, rule.base_keys, seen, soft=rule.soft, shared=shared)
        self.passes = passes(rule, batch, self.runs, self.nodes)
        self.statistics: TokenStatistics | None = None
        if with_metrics:
            trajectories = self._trajectories(shared) if by_trajectory else None
            share = batch.expert_share if rule.uses_experts else None
            self.statistics = TokenStatistics(batch, self.runs, trajectories, share)

    def _trajectories(self, shared: bool) -> int:
        if self.nodes is not None:
            return self.nodes.sizes[TRAJECTORY_KEY]
        ids = self.runs.ids[TRAJECTORY_KEY]
        return table_size(TRAJECTORY_KEY, int(ids.max()) if ids.numel() else -1, self.batch.counts, shared=shared)

    def _fused(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        return fused_sum(tables, self.reduce) if tables else {}

    def first_pass(self) -> tuple[Gating, Tensor | None]:
        node_sums = self.passes.first(self.statistics)
        tables: dict[str, Tensor] = {}
        if self.nodes is not None and node_sums is not None:
            tables["nodes"] = node_sums
            tables.update(parent_tables(self.nodes, self.runs, self.rule.parent_keys))
        if self.statistics is not None:
            tables.update(self.statistics.first_tables())
        reduced = self._fused(tables)
        if self.statistics is not None:
            self.statistics.after_first(reduced)
        sums = reduced.get("nodes")
        return self.rule.prepare(self.nodes, sums, reduced.get("parents"), self.batch.log_ratio), sums

    def second_pass(self, gating: Gating) -> tuple[GatedTokens, dict[str, Tensor]]:
        gated = self.passes.second(gating, self.statistics)
        tables = {} if gated.node_sums is None else {"nodes": gated.node_sums}
        if self.statistics is not None:
            tables.update(self.statistics.second_tables(gated.value))
        return gated, self._fused(tables)

    def third_pass(self, gating: Gating, reduced: dict[str, Tensor], gradient: Tensor) -> None:
        table = gating.adjoint(reduced["nodes"]) if self.nodes is not None else None
        if table is not None and bool(table.any()):
            self.passes.third(gating, table, gradient)
        if self.batch.any_beyond_clamp:
            gradient.masked_fill_(self.batch.log_ratio.abs() > MAX_LOG_RATIO, 0.0)
