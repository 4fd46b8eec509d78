"""One objective call: three passes over this rank's tokens with two fused reductions between them.

pass 1: node sums and statistics  -> reduce -> gates on nodes
pass 2: gated ratio, direct gradient, adjoint sums -> reduce -> adjoints on nodes
pass 3: the gradient that reaches tokens through aggregates (skipped while it is zero)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.collective import Reduce, fused_sum
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.membership import NodeMap, make_node_map
from fiberpo_megatron.fibration.metrics import ObjectiveMetrics
from fiberpo_megatron.fibration.rule import Chunk, Gating, Rule
from fiberpo_megatron.fibration.runs import Runs, find_runs, iterate
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


def evaluate(rule: Rule, batch: TokenBatch, reduce: Reduce | None, *, with_metrics: bool) -> ObjectiveOutput:
    """Run an objective on this rank's tokens."""
    call = _Call(rule, batch, reduce, with_metrics=with_metrics)
    gating, node_sums = call.first_pass()
    ratio, gradient, value, reduced = call.second_pass(gating)
    call.third_pass(gating, reduced, gradient)
    metrics = None
    if call.statistics is not None:
        metrics = call.statistics.metrics(gating, reduced, call.nodes, node_sums, alone=reduce is None)
    return ObjectiveOutput(ratio, gradient, value, metrics)


class _Call:
    def __init__(self, rule: Rule, batch: TokenBatch, reduce: Reduce | None, *, with_metrics: bool) -> None:
        self.rule, self.batch, self.reduce = rule, batch, reduce
        keys = (*rule.base_keys, *rule.parent_keys)
        by_trajectory = with_metrics and TRAJECTORY_KEY in batch.ids
        seen = (*keys, TRAJECTORY_KEY) if by_trajectory and TRAJECTORY_KEY not in keys else keys
        self.runs: Runs = find_runs(batch, seen)
        shared = reduce is not None
        self.nodes: NodeMap | None = None
        if rule.has_nodes:
            self.nodes = make_node_map(batch, self.runs, rule.base_keys, seen, soft=rule.soft, shared=shared)
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

    def _chunks(self) -> Iterator[Chunk]:
        batch = self.batch
        for tokens, runs in iterate(self.runs):
            x = batch.log_ratio[tokens]
            if batch.any_beyond_clamp:
                x = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            yield Chunk(tokens, runs, x, batch.advantages[tokens], batch.weights[tokens], batch.any_weightless)

    def _table(self, rows: int) -> Tensor:
        assert self.nodes is not None
        shape = (rows, self.nodes.base_nodes, self.nodes.partitions)
        return torch.zeros(shape, dtype=torch.float64, device=self.batch.log_ratio.device)

    def _fused(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        return fused_sum(tables, self.reduce) if tables else {}

    def first_pass(self) -> tuple[Gating, Tensor | None]:
        tables: dict[str, Tensor] = {}
        if self.nodes is not None:
            tables["nodes"] = self._table(self.rule.node_terms)
            tables.update(parent_tables(self.nodes, self.runs, self.rule.parent_keys))
        for chunk in self._chunks():
            if self.nodes is not None:
                self.nodes.sum_into(tables["nodes"], self.rule.terms(chunk), chunk.tokens, chunk.runs)
            if self.statistics is not None:
                self.statistics.first(chunk)
        if self.statistics is not None:
            tables.update(self.statistics.first_tables())
        reduced = self._fused(tables)
        if self.statistics is not None:
            self.statistics.after_first(reduced)
        sums = reduced.get("nodes")
        return self.rule.prepare(self.nodes, sums, reduced.get("parents"), self.batch.log_ratio), sums

    def second_pass(self, gating: Gating) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        ratio, gradient = torch.empty_like(self.batch.log_ratio), torch.empty_like(self.batch.log_ratio)
        value = torch.zeros((), dtype=torch.float64, device=ratio.device)
        tables: dict[str, Tensor] = {}
        if self.nodes is not None:
            tables["nodes"] = self._table(self.rule.adjoint_terms)
        for chunk in self._chunks():
            values = [] if self.nodes is None else self._gather(gating.node_values, chunk)
            gated = gating.gate(chunk, values)
            ratio[chunk.tokens], gradient[chunk.tokens] = gated.ratio, gated.gradient
            value += (chunk.weights * chunk.advantages).mul_(gated.ratio).sum(dtype=torch.float64)
            if self.nodes is not None:
                self.nodes.sum_into(tables["nodes"], gated.node_terms, chunk.tokens, chunk.runs)
            if self.statistics is not None:
                self.statistics.second(chunk, gated)
        if self.statistics is not None:
            tables.update(self.statistics.second_tables(value))
        return ratio, gradient, value, self._fused(tables)

    def third_pass(self, gating: Gating, reduced: dict[str, Tensor], gradient: Tensor) -> None:
        table = gating.adjoint(reduced["nodes"]) if self.nodes is not None else None
        if table is not None and bool(table.any()):
            for chunk in self._chunks():
                gradient[chunk.tokens] += gating.finish(chunk, self._gather(table, chunk))
        if self.batch.any_beyond_clamp:
            gradient.masked_fill_(self.batch.log_ratio.abs() > MAX_LOG_RATIO, 0.0)

    def _gather(self, table: Tensor | None, chunk: Chunk) -> list[Tensor]:
        assert self.nodes is not None and table is not None
        return self.nodes.gather(table, chunk.tokens, chunk.runs)
