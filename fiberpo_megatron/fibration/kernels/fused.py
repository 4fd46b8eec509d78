"""This module makes one objective call in fused kernels: it does what `evaluate` does in torch, with two host waits.

The host waits for the number of runs (if ids matter) and, when all kernels are launched, for the metrics together with
flags for malformed tokens and levels that do not nest. If a flag is set, the call goes through the torch path's checks,
which write the messages. Unlike in torch, a malformed token is found after the reductions: then every rank raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import import_module

import torch
import triton
from torch import Tensor

from fiberpo_megatron.fibration import histogram
from fiberpo_megatron.fibration.amplification import Amplification, origin
from fiberpo_megatron.fibration.collective import Reduce, fused_sum
from fiberpo_megatron.fibration.evaluate import beyond_range
from fiberpo_megatron.fibration.exact import Range
from fiberpo_megatron.fibration.explain import CallTrace
from fiberpo_megatron.fibration.fiber import FiberPO
from fiberpo_megatron.fibration.gates import GatedTree, gate_tree, received_by_level
from fiberpo_megatron.fibration.kernels import exact_sums, token_kernels
from fiberpo_megatron.fibration.kernels.device_tree import DeviceTree, HostTree
from fiberpo_megatron.fibration.kernels.formulas import Formulas
from fiberpo_megatron.fibration.kernels.launch import launch
from fiberpo_megatron.fibration.kernels.run_plan import Plan, make_plan
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.objective_metrics import ObjectiveMetrics
from fiberpo_megatron.fibration.rule import Gating, Rule
from fiberpo_megatron.fibration.statistics import statistic_ranges, summarise
from fiberpo_megatron.fibration.tokens import TokenBatch, check_values
from fiberpo_megatron.fibration.tree import build_tree

OLDEST_TRITON = (3, 4)
"""The oldest version that the kernels were written for; torch 2.8 brings it."""
TILE_BYTES = 8192
"""Expert shares per program, [BLOCK, padded P]: 16 registers for each of 128 threads. At twice as much the second
pass fills all 255 registers for P = 8 (compiled for sm_90), and float64 spills."""
MAX_BLOCK, MIN_BLOCK = 1024, 16
PROGRAMS_AT_ONCE = 1024
"""Programs of a pass whose totals are added side by side."""
NODES_AT_ONCE = 256
"""Nodes per program that decodes sums."""


def why_not(batch: TokenBatch) -> str | None:
    """Return why these tokens cannot go through the kernels; None when they can."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton is {triton.__version__}, but the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"
    if not batch.log_ratio.is_cuda and isinstance(token_kernels.first_pass, triton.JITFunction):
        return (
            f"the tensors are on {batch.log_ratio.device}, but the kernels need CUDA tensors (or Triton's interpreter)"
        )
    return None


def block_size(partitions: int, dtype: torch.dtype) -> int:
    """Return the number of tokens per program."""
    row = triton.next_power_of_2(partitions) * dtype.itemsize
    return min(MAX_BLOCK, max(MIN_BLOCK, TILE_BYTES // row))


def formulas_of(rule: Rule) -> Formulas:
    """Return the formulas that an objective's `kernel` names. Raises ValueError where there are none."""
    path = rule.require_kernel()
    module, _, name = path.partition(":")
    found = getattr(import_module(module), name, None)
    if not isinstance(found, Formulas):
        raise ValueError(
            f"the kernel of objective {rule.name!r} is {path!r}, which is {type(found).__name__}; name a Formulas "
            "object as package.module:NAME (fiberpo_megatron/fibration/kernels/formulas.py)"
        )
    return found


def evaluate_fused(
    rule: Rule, batch: TokenBatch, keys: tuple[str, ...], reduce: Reduce | None, *, with_metrics: bool
) -> tuple[Tensor, Tensor, Tensor, ObjectiveMetrics | None, Amplification | None, CallTrace | None]:
    """Return gated ratio [N], gradient [N], this rank's value, the metrics, this rank's largest amplification, and what
    explains single tokens; `keys` are those whose ids matter."""
    x = batch.log_ratio
    with torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext():
        call = _FusedCall(rule, batch, keys, reduce, with_metrics=with_metrics)
        first = call.first_pass()
        ratio, gradient, value, second = call.second_pass(first)
        call.third_pass(first, second, gradient)
        return ratio, gradient, value, *call.finish(first, second)


class _FusedCall:
    def __init__(
        self, rule: Rule, batch: TokenBatch, keys: tuple[str, ...], reduce: Reduce | None, *, with_metrics: bool
    ) -> None:
        self.rule, self.batch, self.reduce, self.with_metrics = rule, batch, reduce, with_metrics
        self.formulas = formulas_of(rule)
        self.x, self.advantages = batch.log_ratio.contiguous(), batch.advantages.contiguous()
        self.weights = batch.weights.contiguous()
        block = block_size(batch.partitions, self.x.dtype)
        self.plan: Plan | None = None
        if keys:
            self.plan = make_plan(rule, batch, keys, block=block, shared=reduce is not None)
        share = batch.expert_share if self.plan is None else self.plan.nodes.share
        self.share = None if share is None else share.contiguous()
        self.programs = max(1, triton.cdiv(batch.size, block) if self.plan is None else self.plan.runs)
        self.tile = {
            "EXPERTS": self.share is not None,
            "SOFT": rule.soft,
            "P": batch.partitions,
            "PADDED": triton.next_power_of_2(batch.partitions),
            "BLOCK": block,
            "CLAMP": rule.max_log_ratio,
        }
        self.trajectories = 0
        if self.plan is not None and with_metrics and TRAJECTORY_KEY in keys:
            self.trajectories = self.plan.nodes.sizes[TRAJECTORY_KEY]
        self.tree: DeviceTree | HostTree | None = None
        if isinstance(rule, FiberPO):
            assert self.plan is not None
            if rule.branch_choice is None:
                self.tree = DeviceTree(rule.tree, self.plan.nodes, self.x.dtype, rule.k_max)
            else:
                self.tree = HostTree(rule, self.plan.nodes, self.x.dtype)
        # Integers that programs add to or raise: the histogram, tokens and clipped tokens per trajectory, whether a sum
        # is beyond its range, and the tree's.
        ints = [histogram.BINS if with_metrics else 0, self.trajectories, self.trajectories, 1]
        ints.append(0 if self.tree is None else self.tree.integers)
        zeros = torch.zeros(sum(ints), dtype=torch.int32, device=self.x.device)
        self.bins, self.tokens_of, self.clipped_of, self.beyond, of_tree = zeros.split(ints)
        if self.tree is not None:
            self.tree.place_in(of_tree)
        # per program the largest |c| / (mu |A|) and its token
        self.largest = self._floats(self.programs, 2) if self.tree is not None and with_metrics else None

    def first_pass(self) -> dict[str, Tensor]:
        """Return the first reduction's tables."""
        ranges, of_statistics = self.rule.term_ranges, statistic_ranges(self.rule)
        rows = len(ranges)
        if not rows and not self.with_metrics:
            return {}
        sums, top = self._run_sums(ranges), self._floats(self.programs)
        statistics = self._integers(self.programs, sum(it.limbs for it in of_statistics))
        launch(
            token_kernels.first_pass,
            (self.programs,),
            self.x,
            self.weights,
            self.share,
            self._starts,
            self._trajectory,
            sums,
            statistics,
            top,
            self.bins,
            self.tokens_of,
            self.beyond,
            self.batch.size,
            TERMS=self.formulas.terms,
            ROWS=rows,
            **exact_sums.layout_of(ranges),
            STATISTICS=self.with_metrics,
            **{f"STATISTIC_{name}": value for name, value in exact_sums.layout_of(of_statistics).items()},
            TRAJECTORIES=self.trajectories > 0,
            RUNS=self.plan is not None,
            **self.tile,
        )
        tables: dict[str, Tensor] = {}
        if self.plan is not None and sums is not None:
            tables["nodes"] = self.plan.sum_runs(sums, ranges)
            if self.rule.parent_keys:
                tables["parents"] = self.plan.parent_tables(len(self.rule.parent_keys))
        if self.with_metrics:
            tables |= {"sums": self._sum_programs(statistics, of_statistics), "log_ratio_histogram": self.bins}
            self.top = top.amax()
            if self.trajectories:
                tables["trajectory_tokens"] = self.tokens_of
        reduced = self._reduced(tables, ranges)
        if "nodes" in reduced:
            self.rule.blind_lone_node(reduced["nodes"])
        return reduced

    def second_pass(self, first: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return the gated ratio, the direct gradient, this rank's value, and the second reduction's tables."""
        values = first.get("nodes") if self.tree is None else self.tree.gate(first["nodes"], first.get("parents"))
        ratio, gradient = torch.empty_like(self.x), torch.empty_like(self.x)
        ranges = self.rule.adjoint_ranges
        of_totals = (Range(0, 1), Range(0, 1), self.rule.value_range)  # clipped and malformed tokens, value
        sums, statistics = self._run_sums(ranges), self._integers(self.programs, 2 + of_totals[2].limbs)
        launch(
            token_kernels.second_pass,
            (self.programs,),
            self.x,
            self.advantages,
            self.weights,
            self.share,
            self._starts,
            self._base,
            self._trajectory,
            values,
            ratio,
            gradient,
            sums,
            statistics,
            self.clipped_of,
            self.beyond,
            self.largest,
            self.batch.size,
            0 if self.plan is None else self.plan.nodes.base_nodes,
            GATE=self.formulas.gate,
            OPTIONS=self.formulas.options(self.rule),
            VALUES=0 if values is None else values.shape[0],
            ROWS=len(ranges),
            **exact_sums.layout_of(ranges),
            VALUE_TOP=of_totals[2].top,
            VALUE_LIMBS=of_totals[2].limbs,
            LARGEST=self.largest is not None,
            TRAJECTORIES=self.trajectories > 0,
            RUNS=self.plan is not None,
            **self.tile,
        )
        totals = self._sum_programs(statistics, of_totals)
        tables = {"totals": totals}
        if self.plan is not None and sums is not None:
            tables["nodes"] = self.plan.sum_runs(sums, ranges)
        if self.trajectories:
            tables["trajectory_clipped"] = self.clipped_of
        if self.with_metrics:
            tables["max"] = self._floats(histogram.FINE_BINS)
            launch(token_kernels.place_maximum, (1,), first["log_ratio_histogram"], self.top, tables["max"])
        value = self._floats(1)
        self._decode(totals[2:], value, (self.rule.value_range,), 1)
        return ratio, gradient, value[0], self._reduced(tables, ranges, reduce=bool(first))

    def third_pass(self, first: dict[str, Tensor], second: dict[str, Tensor], gradient: Tensor) -> None:
        """Add the gradient through aggregates."""
        if "nodes" not in second:
            return
        assert self.plan is not None
        table = second["nodes"] if self.tree is None else self.tree.adjoin(second["nodes"])
        more = first["nodes"] if self.tree is None else None
        launch(
            token_kernels.third_pass,
            (self.programs,),
            self.x,
            self.advantages,
            self.weights,
            self.share,
            self._starts,
            self._base,
            table,
            more,
            gradient,
            self.largest,
            self.plan.nodes.base_nodes,
            FINISH=self.formulas.finish,
            OPTIONS=self.formulas.options(self.rule),
            VALUES=table.shape[0],
            MORE=0 if more is None else more.shape[0],
            LARGEST=self.largest is not None,
            **self.tile,
        )
        if self.largest is not None:
            self.found = self._floats(4 + self.batch.partitions)
            tensors = self._base, self.x, self.weights, self.share, gradient, self.found
            tile = {name: self.tile[name] for name in ("EXPERTS", "P", "PADDED")}
            launch(
                token_kernels.find_largest, (1,), self.largest, *tensors, self.plan.runs, **tile, BLOCK=PROGRAMS_AT_ONCE
            )

    def finish(
        self, first: dict[str, Tensor], second: dict[str, Tensor]
    ) -> tuple[ObjectiveMetrics | None, Amplification | None, CallTrace | None]:
        """Return the metrics, this rank's amplification and the trace, read together with the flags. Raises ValueError
        when a flag is set."""
        wanted = {"totals": second["totals"], "overflow": second["overflow"], "beyond": self.beyond}
        if self.tree is not None and self.tree.flag.numel():
            wanted["flag"] = self.tree.flag
        if self.with_metrics:
            wanted |= {**first, **{name: second[name] for name in second if name not in ("nodes", "overflow")}}
        if self.largest is not None:
            wanted |= {"adjoints": second["nodes"], "largest": self.found}
        read = _to_host(wanted)
        malformed = float(read["totals"][1])
        if malformed:
            check_values(self.batch, self.rule.max_log_ratio)
            raise ValueError(f"{malformed:.0f} tokens of other ranks are malformed; their ranks' errors name them")
        if read["overflow"].any() or read["beyond"].any():
            raise ValueError(beyond_range(self.rule))
        if "flag" in read and read["flag"].any() and not self.with_metrics:
            self._gated_tree(_to_host(first))
        if not self.with_metrics:
            return None, None, None
        read |= {"value": read["totals"][2:], "clipped": read["totals"][0]}
        tree = self._gated_tree(read)
        experts = self.plan.nodes if self.plan is not None and self.rule.uses_experts else None
        metrics = summarise(self.rule, read, read, tree, experts)
        return metrics, self._amplification(read, tree), self._trace(read)

    def _trace(self, read: dict[str, Tensor]) -> CallTrace:
        """Return what explains single tokens on the host, from the sums that were read for the metrics."""
        nodes = None if self.plan is None or not self.rule.node_terms else self.plan.nodes
        like = torch.zeros(0, dtype=self.x.dtype)

        def prepare() -> Gating:
            return self.rule.prepare(nodes, read.get("nodes"), read.get("parents"), like)

        return CallTrace(self.rule, self.batch, {} if nodes is None else nodes.sizes, prepare, torch.device("cpu"))

    def _amplification(self, read: dict[str, Tensor], gated: GatedTree | None) -> Amplification | None:
        if gated is None or self.plan is None or float(read["largest"][0]) == 0.0:
            return None
        weight, *clipped = read["adjoints"].reshape(3, -1).index_select(1, gated.tree.index)
        received = received_by_level(gated, weight, torch.stack(clipped))
        value, base, positive, push = read["largest"][:4].unsqueeze(1)
        share = None if self.share is None else read["largest"][4:].unsqueeze(0)
        where = float(value), int(base), push, positive > 0, share
        return origin(self.plan.nodes, gated, received, read.get("parents"), *where)

    def _gated_tree(self, tables: dict[str, Tensor]) -> GatedTree | None:
        """Return the tree in torch on the host. Raises ValueError if levels do not nest."""
        if self.tree is None or self.plan is None or self.tree.gated is not None:
            return None if self.tree is None else self.tree.gated
        tree = build_tree(self.tree.chain, self.plan.nodes, tables["nodes"], tables.get("parents"))
        return gate_tree(tree, self.tree.k_max)

    @property
    def _starts(self) -> Tensor | None:
        return None if self.plan is None else self.plan.starts

    @property
    def _base(self) -> Tensor | None:
        return None if self.plan is None else self.plan.base

    @property
    def _trajectory(self) -> Tensor | None:
        return self.plan.row(TRAJECTORY_KEY) if self.plan is not None and self.trajectories else None

    def _reduced(self, tables: dict[str, Tensor], ranges: Sequence[Range], *, reduce: bool = True) -> dict[str, Tensor]:
        """Sum over ranks: of a node's limbs come back its sums, and in "overflow" whether one was beyond its range."""
        reduced = fused_sum({**tables, "overflow": self.beyond}, self.reduce if reduce else None)
        if "nodes" in reduced:
            limbs = reduced["nodes"]
            reduced["nodes"] = self._floats(len(ranges), *limbs.shape[1:])
            self._decode(limbs, reduced["nodes"], ranges, limbs[0].numel())
        return reduced

    def _decode(self, limbs: Tensor, out: Tensor, ranges: Sequence[Range], size: int) -> None:
        constants = {"ROWS": len(ranges), **exact_sums.layout_of(ranges), "BLOCK": NODES_AT_ONCE}
        grid = (triton.cdiv(size, NODES_AT_ONCE),)
        launch(exact_sums.decode_sums, grid, limbs, out, self.beyond, size, **constants)

    def _sum_programs(self, statistics: Tensor, ranges: Sequence[Range]) -> Tensor:
        """Add up what programs stored, int64 [programs, limbs]; return float64 [limbs] in normalised form."""
        out = self._floats(statistics.shape[1])
        layout = exact_sums.layout_of(ranges)
        constants = {"ROWS": len(ranges), "LIMBS": layout["LIMBS"], "FIRST": layout["FIRST"]}
        arguments = (statistics, out, self.programs)
        launch(exact_sums.sum_programs, (len(ranges),), *arguments, **constants, BLOCK=PROGRAMS_AT_ONCE)
        return out

    def _run_sums(self, ranges: Sequence[Range]) -> Tensor | None:
        """Allocate the limbs of sums per run and partition; every program fills its own."""
        limbs = sum(it.limbs for it in ranges)
        return self._integers(self.programs, limbs, self.batch.partitions) if limbs else None

    def _integers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self.x.device)

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.x.device)


def _to_host(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tables in float64, read in one copy."""
    flat = [table.reshape(-1) for table in tables.values()]
    whole = (torch.cat(flat) if len(flat) > 1 else flat[0]).cpu()
    parts = whole.split([table.numel() for table in flat])
    return {name: part.view(table.shape) for part, (name, table) in zip(parts, tables.items(), strict=True)}
