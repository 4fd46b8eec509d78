"""The passes as one Triton kernel each, with the launches around them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from fiberpo_megatron.fibration.kernels import blocks
from fiberpo_megatron.fibration.kernels.formulas import FORMULAS
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.passes import GatedTokens, Passes
from fiberpo_megatron.fibration.rule import Gating, Rule
from fiberpo_megatron.fibration.runs import Runs
from fiberpo_megatron.fibration.statistics import TokenStatistics
from fiberpo_megatron.fibration.tokens import TokenBatch

OLDEST_TRITON = (3, 4)
"""The oldest version that the kernels were compiled with; torch 2.8 brings it."""
TILE_BYTES = 8192
"""Expert shares per program, [BLOCK, padded P]: 16 registers for each of 128 threads. At twice as much the second
pass fills all 255 registers for P = 8 (compiled for sm_90), and float64 spills."""
MAX_BLOCK, MIN_BLOCK = 1024, 16
RUNS_AT_ONCE = 64
"""Runs of a node that `sum_runs` adds side by side."""


def why_not(rule: Rule, like: Tensor) -> str | None:
    """Why these tokens cannot go through the kernels; None when they can."""
    if type(rule) not in FORMULAS:
        return f"{type(rule).__name__} has no kernels"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton is {triton.__version__}, the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"
    if not like.is_cuda and isinstance(blocks.first_pass, triton.JITFunction):
        return f"the tensors are on {like.device}, the kernels need CUDA tensors (or Triton's interpreter)"
    return None


def block_size(partitions: int, dtype: torch.dtype) -> int:
    """Tokens per program."""
    row = triton.next_power_of_2(partitions) * dtype.itemsize
    return min(MAX_BLOCK, max(MIN_BLOCK, TILE_BYTES // row))


class FusedPasses(Passes):
    """Node sums are float64 and deterministic: per run of at most BLOCK tokens first, then per node in order."""

    def __init__(self, rule: Rule, batch: TokenBatch, runs: Runs, nodes: NodeMap | None) -> None:
        super().__init__(rule, batch, runs, nodes)
        self.formulas = FORMULAS[type(rule)]
        self.x, self.advantages = batch.log_ratio.contiguous(), batch.advantages.contiguous()
        self.weights = batch.weights.contiguous()
        self.share = None if batch.expert_share is None else batch.expert_share.contiguous()
        self.programs = runs.starts.shape[0]
        self.layout = {"P": batch.partitions, "PADDED": triton.next_power_of_2(batch.partitions)}
        self.tile = {**self.layout, "EXPERTS": self.share is not None, "SOFT": rule.soft, "BLOCK": runs.chunk}

    @staticmethod
    def chunk(batch: TokenBatch) -> int:
        return block_size(batch.partitions, batch.log_ratio.dtype)

    def first(self, statistics: TokenStatistics | None) -> Tensor | None:
        rows = self.rule.node_terms
        if self.nodes is None and statistics is None:
            return None
        sums = self._run_sums(rows)
        totals, bins = self._zeros(self.programs, 6), self._zeros(blocks.BINS.value, dtype=torch.int32)
        self._launch(
            blocks.first_pass,
            self.x,
            self.weights,
            self.share,
            self.runs.starts,
            self.runs.lengths,
            sums,
            totals,
            bins,
            TERMS=self.formulas.terms,
            ROWS=rows,
            STATISTICS=statistics is not None,
        )
        if statistics is not None:
            statistics.add_first(totals.sum(0), bins, totals[:, 0], slice(None))
        return self._node_sums(sums)

    def second(self, gating: Gating, statistics: TokenStatistics | None) -> GatedTokens:
        ratio, gradient = torch.empty_like(self.x), torch.empty_like(self.x)
        rows = self.rule.adjoint_terms
        sums = self._run_sums(rows)
        totals = self._zeros(self.programs, 2)
        values = gating.node_values
        self._launch(
            blocks.second_pass,
            self.x,
            self.advantages,
            self.weights,
            self.share,
            self.runs.starts,
            self.runs.lengths,
            None if self.nodes is None else self.nodes.base_of_run,
            None if values is None else values.contiguous(),
            ratio,
            gradient,
            sums,
            totals,
            0 if self.nodes is None else self.nodes.base_nodes,
            GATE=self.formulas.gate,
            OPTIONS=self.formulas.options(self.rule),
            VALUES=0 if values is None else values.shape[0],
            ROWS=rows,
        )
        if statistics is not None:
            statistics.add_second(totals[:, 1].sum(), totals[:, 1], slice(None))
        return GatedTokens(ratio, gradient, totals[:, 0].sum(), self._node_sums(sums))

    def third(self, gating: Gating, table: Tensor, gradient: Tensor) -> None:
        assert self.nodes is not None
        self._launch(
            blocks.third_pass,
            self.x,
            self.weights,
            self.share,
            self.runs.starts,
            self.runs.lengths,
            self.nodes.base_of_run,
            table.contiguous(),
            gradient,
            self.nodes.base_nodes,
            FINISH=self.formulas.finish,
            VALUES=table.shape[0],
        )

    def _launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        if self.programs:
            with torch.cuda.device_of(self.x):
                kernel[(self.programs,)](*arguments, **constants, **self.tile)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.x.device)

    def _run_sums(self, rows: int) -> Tensor | None:
        """Room for `rows` sums per run and partition; every program fills its own."""
        shape = (self.programs, rows, self.layout["P"])
        return torch.empty(shape, dtype=torch.float64, device=self.x.device) if self.nodes is not None else None

    @cached_property
    def _runs_by_node(self) -> tuple[Tensor, Tensor]:
        """Runs sorted by base node, in token order within each, and where each node's begin: [R], [base_nodes + 1]."""
        assert self.nodes is not None
        base, order = torch.sort(self.nodes.base_of_run, stable=True)
        edges = torch.arange(self.nodes.base_nodes + 1, device=base.device)
        return order, torch.searchsorted(base, edges)

    def _node_sums(self, sums: Tensor | None) -> Tensor | None:
        """Per-run sums [R, C, P] added per node, in order: [C, base_nodes, P]."""
        if sums is None or self.nodes is None:
            return None
        rows, nodes = sums.shape[1], self.nodes.base_nodes
        table = self._zeros(rows, nodes, self.layout["P"])
        if self.programs:
            order, offsets = self._runs_by_node
            with torch.cuda.device_of(self.x):
                blocks.sum_runs[(nodes, rows)](
                    sums, order, offsets, table, nodes, ROWS=rows, BLOCK=RUNS_AT_ONCE, **self.layout
                )
        return table
