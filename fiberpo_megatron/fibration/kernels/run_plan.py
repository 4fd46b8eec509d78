"""This module finds the runs and nodes of a call on the device, with one wait for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fiberpo_megatron.fibration.exact import Range
from fiberpo_megatron.fibration.kernels import run_kernels
from fiberpo_megatron.fibration.kernels.exact_sums import layout_of
from fiberpo_megatron.fibration.kernels.launch import launch
from fiberpo_megatron.fibration.membership import NodeMap, checked_size, make_node_map, parent_ids
from fiberpo_megatron.fibration.rule import Rule
from fiberpo_megatron.fibration.tokens import TokenBatch

SEARCH_BLOCK = 1024
"""Tokens per program that looks for runs; with 4,096 the registers of sm_90 do not suffice for four keys."""
RUNS_AT_ONCE = 64
"""Runs of a node that are added side by side."""


@dataclass(frozen=True)
class Plan:
    """Holds runs over some keys, base keys first, cut at every BLOCK tokens, and the nodes they belong to."""

    keys: tuple[str, ...]
    runs: int
    starts: Tensor
    """First token of each run, and the number of tokens; int64 [max(runs, 1) + 1]."""
    ids: Tensor
    """Per key, and for the base node, the id of each run; int64 [keys + 1, max(runs, 1)]."""
    sorted_base: Tensor
    order: Tensor | None
    """Runs in the order of their base nodes [R]; None when that is their own order."""
    nodes: NodeMap
    """Sizes of all keys and of the finest level's tables."""
    parent_ids: Tensor
    """Its rows from `first_parent` on are the ids that runs report for each key that only coarser levels name, int64
    [..., max(runs, 1)]."""
    first_parent: int

    def row(self, key: str) -> Tensor:
        """Return the id of each run."""
        return self.ids[self.keys.index(key)]

    @property
    def base(self) -> Tensor:
        """Return the base node of each run."""
        return self.ids[-1]

    def sum_runs(self, sums: Tensor, ranges: Sequence[Range]) -> Tensor:
        """Add the limbs of sums per run, int64 [R, limbs, P], per node; return float64 [limbs, base_nodes, P]."""
        rows, partitions, nodes = len(ranges), sums.shape[2], self.nodes.base_nodes
        table = torch.empty((sums.shape[1], nodes, partitions), dtype=torch.float64, device=sums.device)
        layout = layout_of(ranges)
        launch(
            run_kernels.sum_runs,
            (nodes, rows),
            sums,
            self.sorted_base,
            self.order,
            table,
            self.runs,
            nodes,
            ROWS=rows,
            LIMBS=layout["LIMBS"],
            FIRST=layout["FIRST"],
            ORDERED=self.order is None,
            P=partitions,
            PADDED=triton.next_power_of_2(partitions),
            RUNS=RUNS_AT_ONCE,
        )
        return table

    def parent_tables(self, keys: int) -> Tensor:
        """Return `tree.parent_tables` of `keys` keys: [1 + 2 * keys, base_nodes]."""
        nodes = self.nodes.base_nodes
        table = torch.empty((1 + 2 * keys, nodes), dtype=torch.float64, device=self.ids.device)
        launch(
            run_kernels.report_parents,
            (nodes,),
            self.parent_ids,
            self.sorted_base,
            self.order,
            table,
            self.runs,
            nodes,
            FIRST=self.first_parent,
            KEYS=keys,
            PADDED_KEYS=triton.next_power_of_2(keys),
            ORDERED=self.order is None,
            RUNS=RUNS_AT_ONCE,
        )
        return table


def make_plan(rule: Rule, batch: TokenBatch, keys: tuple[str, ...], *, block: int, shared: bool) -> Plan:
    """Check the ids of `keys`, of which there is at least one; wait for the number of runs and the ids' ranges."""
    device, size = batch.log_ratio.device, batch.size
    ids = tuple(batch.ids[key].contiguous() for key in keys)
    blocks = max(1, triton.cdiv(size, SEARCH_BLOCK))
    base = len(rule.base_keys)
    found = torch.zeros(2 + 2 * len(keys), dtype=torch.int64, device=device)
    counts = torch.empty(blocks, dtype=torch.int64, device=device)
    constants = {"BASE": base, "CUT": block, "BLOCK": SEARCH_BLOCK}
    launch(run_kernels.find_cuts, (blocks,), ids, counts, found, size, **constants)
    runs, unsorted, *ranges = found.tolist()
    sizes = {}
    for key, high, below in zip(keys, ranges[::2], ranges[1::2], strict=True):
        sizes[key] = checked_size(key, (-below, high) if size else (0, -1), batch, shared=shared)
    empty = torch.zeros if not size else torch.empty
    starts = empty(max(runs, 1) + 1, dtype=torch.int64, device=device)
    table = empty((len(keys) + 1, max(runs, 1)), dtype=torch.int64, device=device)
    if size:
        args = (ids, tuple(sizes.values()), counts, starts, table, size, runs)
        launch(run_kernels.write_runs, (blocks,), *args, **constants)
    of_run = {key: table[row, :runs] for row, key in enumerate(keys)}
    nodes = make_node_map(rule, batch, of_run, sizes, starts[:runs], table[-1])
    parents, first_parent = table, base
    if nodes.branch_of_run is not None:  # the base nodes of each branch have a range of their own
        table[-1, :runs], unsorted = nodes.base_of_run, 1
        reported = list(parent_ids(rule, nodes, of_run).values())
        parents, first_parent = (torch.stack(reported) if runs and reported else table), 0
    sorted_base, order = (table[-1], None) if not unsorted else torch.sort(table[-1], stable=True)
    return Plan(keys, runs, starts, table, sorted_base, order, nodes, parents, first_parent)
