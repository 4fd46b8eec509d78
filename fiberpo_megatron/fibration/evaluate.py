"""Run one objective call: three passes over this rank's tokens with two fused reductions between them.

pass 1: node sums and statistics  -> reduce -> gates on nodes
pass 2: gated ratio, direct gradient, adjoint sums -> reduce -> adjoints on nodes
pass 3: the gradient that reaches tokens through aggregates (skipped while it is zero)
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.amplification import Amplification, origin
from fiberpo_megatron.fibration.collective import Reduce, fused_sum
from fiberpo_megatron.fibration.exact import NodeSums, Totals
from fiberpo_megatron.fibration.explain import CallTrace
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.membership import NodeMap, checked_size, id_range, make_node_map, parent_ids
from fiberpo_megatron.fibration.objective_metrics import ObjectiveMetrics
from fiberpo_megatron.fibration.passes import GatedTokens, Passes
from fiberpo_megatron.fibration.rule import Gating, Rule
from fiberpo_megatron.fibration.runs import Runs, find_runs
from fiberpo_megatron.fibration.statistics import TokenStatistics, summarise
from fiberpo_megatron.fibration.tokens import TokenBatch, ValueRanges, check_values
from fiberpo_megatron.fibration.tree import parent_tables


@dataclass(frozen=True)
class ObjectiveOutput:
    """Holds what an objective returns."""

    gated_ratio: Tensor
    """G, [N], in log_ratio's dtype."""
    gradient: Tensor
    """c = dJ/d log_ratio, [N], in log_ratio's dtype: maximise J by minimising -sum_j c_j log pi(a_j)."""
    value: Tensor
    """This rank's share of J, a float64 scalar; the shares sum to J."""
    metrics: ObjectiveMetrics | None
    """Global metrics; None when the call asked for none."""
    amplification: Amplification | None = None
    """The largest |c| / (mu |A|) on this rank, and where it comes from: the largest over ranks is the caller's to find
    (`trainer/optimise.py`). None without metrics, for an objective without gated levels, and where every c is 0."""
    trace: CallTrace | None = None
    """What explains single tokens of this call (`explain`); None without metrics."""


def evaluate(
    rule: Rule, batch: TokenBatch, reduce: Reduce | None, *, with_metrics: bool, kernels: bool | None
) -> ObjectiveOutput:
    """Run an objective on this rank's tokens; `kernels` as in `Objective`."""
    if _use_kernels(rule, batch, kernels):
        from fiberpo_megatron.fibration.kernels.fused import evaluate_fused

        seen = seen_keys(rule, batch, with_metrics=with_metrics)
        return ObjectiveOutput(*evaluate_fused(rule, batch, seen, reduce, with_metrics=with_metrics))
    call = _Call(rule, batch, reduce, with_metrics=with_metrics)
    first, gating = call.first_pass()
    gated, second = call.second_pass(gating)
    call.third_pass(gating, second, gated.gradient)
    metrics = None
    if with_metrics:
        metrics = summarise(rule, first, second, gating.gated_tree, call.nodes if rule.uses_experts else None)
    value = torch.tensor(gated.value.values(0), dtype=torch.float64, device=batch.log_ratio.device)
    if not with_metrics:
        return ObjectiveOutput(gated.ratio, gated.gradient, value, None)
    amplification = call.amplification(gating, first.get("parents"), gated.gradient)
    sizes = {} if call.nodes is None else call.nodes.sizes
    trace = CallTrace(rule, batch, sizes, lambda: gating, batch.log_ratio.device)
    return ObjectiveOutput(gated.ratio, gated.gradient, value, metrics, amplification, trace)


def beyond_range(rule: Rule) -> str:
    """Return the message about a sum that is beyond its range, or a term that is not finite."""
    return (
        f"a sum of objective {rule.name!r} over a node's tokens, on this rank or another, is beyond what it can hold "
        "or not finite; check the weights (mu is at most 1 and sums to 1), the advantages (|A| up to 1e3), and in an "
        "objective of your own `terms`, `node_terms` and the ranges that `term_ranges` and `adjoint_ranges` return"
    )


def seen_keys(rule: Rule, batch: TokenBatch, *, with_metrics: bool) -> tuple[str, ...]:
    """Return the keys whose ids a call looks at: the rule's, base keys first, and "trajectory" for the metrics."""
    keys = rule.keys
    return (*keys, TRAJECTORY_KEY) if with_metrics and TRAJECTORY_KEY in batch.ids.keys() - set(keys) else keys


def _use_kernels(rule: Rule, batch: TokenBatch, kernels: bool | None) -> bool:
    if kernels:
        rule.require_kernel()
    if kernels is False or rule.kernel is None or (kernels is None and not batch.log_ratio.is_cuda):
        return False
    reason: str | None = "Triton is not installed"
    if importlib.util.find_spec("triton") is not None:
        from fiberpo_megatron.fibration.kernels.fused import why_not

        reason = why_not(batch)
    if reason is not None and kernels:
        raise ValueError(f"kernels=True: {reason}; leave kernels unset to use them only where they can run")
    return reason is None


class _Call:
    """One call in torch operations, on any device."""

    def __init__(self, rule: Rule, batch: TokenBatch, reduce: Reduce | None, *, with_metrics: bool) -> None:
        self.rule, self.batch, self.reduce = rule, batch, reduce
        self.ranges: ValueRanges = check_values(batch, rule.max_log_ratio)
        seen = seen_keys(rule, batch, with_metrics=with_metrics)
        self.runs: Runs = find_runs(batch, seen)
        shared = reduce is not None
        self.nodes: NodeMap | None = None
        if rule.node_terms:
            ids = self.runs.ids
            sizes = {name: checked_size(name, id_range(ids[name]), batch, shared=shared) for name in seen}
            self.nodes = make_node_map(rule, batch, ids, sizes, self.runs.starts)
        self.passes = Passes(rule, batch, self.ranges, self.runs, self.nodes)
        self.statistics: TokenStatistics | None = None
        if with_metrics:
            trajectories = self._trajectories(shared) if TRAJECTORY_KEY in seen else None
            share = None if self.nodes is None else self.nodes.share
            top, device = self.ranges.max_log_ratio, batch.log_ratio.device
            self.statistics = TokenStatistics(rule, top, self.runs, trajectories, share, device)

    def _trajectories(self, shared: bool) -> int:
        if self.nodes is not None:
            return self.nodes.sizes[TRAJECTORY_KEY]
        return checked_size(TRAJECTORY_KEY, id_range(self.runs.ids[TRAJECTORY_KEY]), self.batch, shared=shared)

    def _fused(self, sums: NodeSums | None, totals: Totals | None, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum over ranks: of a node's limbs come back its sums. Raises ValueError, on every rank alike, if one of them,
        or of the `totals` among the tables, is beyond its range."""
        if sums is not None:
            tables = {"nodes": sums.to_send(), **tables}
        overflows = totals is not None and totals.overflows
        if not tables:  # nothing crosses ranks
            if overflows:
                raise ValueError(beyond_range(self.rule))
            return {}
        flag = self.batch.log_ratio.new_full((1,), float(overflows), dtype=torch.float64)
        reduced = fused_sum({**tables, "overflow": flag if sums is None else flag + sums.overflow}, self.reduce)
        if sums is not None:
            reduced["nodes"] = sums.decode(reduced["nodes"])
        if bool(reduced.pop("overflow")) or (sums is not None and not bool(torch.isfinite(reduced["nodes"]).all())):
            raise ValueError(beyond_range(self.rule))
        return reduced

    def first_pass(self) -> tuple[dict[str, Tensor], Gating]:
        node_sums = self.passes.first(self.statistics)
        tables: dict[str, Tensor] = {}
        if self.nodes is not None:
            tables.update(parent_tables(self.nodes, parent_ids(self.rule, self.nodes, self.runs.ids)))
        if self.statistics is not None:
            tables.update(self.statistics.first_tables())
        reduced = self._fused(node_sums, None if self.statistics is None else self.statistics.sums, tables)
        if "nodes" in reduced:
            self.rule.blind_lone_node(reduced["nodes"])
        if self.statistics is not None:
            self.statistics.after_first(reduced)
        return reduced, self.rule.prepare(
            self.nodes, reduced.get("nodes"), reduced.get("parents"), self.batch.log_ratio
        )

    def second_pass(self, gating: Gating) -> tuple[GatedTokens, dict[str, Tensor]]:
        gated = self.passes.second(gating, self.statistics)
        tables = {} if self.statistics is None else self.statistics.second_tables(gated.value)
        return gated, self._fused(gated.node_sums, gated.value, tables)

    def third_pass(self, gating: Gating, reduced: dict[str, Tensor], gradient: Tensor) -> None:
        table = gating.adjoint(reduced["nodes"]) if "nodes" in reduced else None
        if table is not None and bool(table.any()):
            self.passes.third(gating, table, gradient)
        if self.ranges.any_beyond_clamp:
            gradient.masked_fill_(self.batch.log_ratio.abs() > self.rule.max_log_ratio, 0.0)

    def amplification(self, gating: Gating, parents: Tensor | None, gradient: Tensor) -> Amplification | None:
        if gating.gated_tree is None or self.nodes is None:
            return None
        found = self.passes.largest(gradient)
        if not found.tokens:
            return None
        at, batch = torch.cat(found.tokens), self.batch
        token = {name: getattr(batch, name).index_select(0, at) for name in ("log_ratio", "weights")}
        push = gradient.index_select(0, at).double() / token["weights"].double()
        share = None if self.nodes.share is None else self.nodes.share.index_select(0, at)
        where = found.value, found.base, push, token["log_ratio"] >= 0, share
        return origin(self.nodes, gating.gated_tree, gating.received, parents, *where)
