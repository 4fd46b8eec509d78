"""This module computes gates and adjoints of a call's nodes.

Those of a chain of levels are computed on the device, by the kernels of `node_kernels`; those of a tree of levels on
the host, by the torch code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fiberpo_megatron.fibration.fiber import FiberPO
from fiberpo_megatron.fibration.gates import GatedTree
from fiberpo_megatron.fibration.kernels import node_kernels
from fiberpo_megatron.fibration.kernels.exact_sums import layout_of
from fiberpo_megatron.fibration.kernels.launch import launch
from fiberpo_megatron.fibration.levels import EXPERT_KEY, LevelTree
from fiberpo_megatron.fibration.membership import MAX_TABLE_NODES, NodeMap
from fiberpo_megatron.fibration.tree import NODE_RANGES

NODE_TILE = 128
"""Finest nodes per program: a thread each."""


def coarse_counts(chain: LevelTree, nodes: NodeMap) -> list[int]:
    """Return the entries of each coarser level's dense table, partitions not counted."""
    counts = []
    for level in chain.levels[1:]:
        count = 1
        for key in level.keys:
            count *= 1 if key == EXPERT_KEY else nodes.sizes[key]
        counts.append(count)
    return counts


class DeviceTree:
    """Holds the nodes of one call's chain of levels; the tokens are of `dtype`, and no gate has k above `k_max`."""

    flag: Tensor
    """int32 [1], or [0] with one level; it is not 0 if levels may not nest."""

    def __init__(self, chain: LevelTree, nodes: NodeMap, dtype: torch.dtype, k_max: float | None) -> None:
        self.chain, self.nodes, self.dtype, self.k_max = chain, nodes, dtype, k_max
        self.levels = len(chain.levels)
        p = nodes.partitions
        self.counts = tuple(coarse_counts(chain, nodes)) or (0,)
        self.experts = tuple(int(EXPERT_KEY in level.keys) for level in chain.levels[1:]) or (0,)
        widths = [count * (p if expert else 1) for count, expert in zip(self.counts, self.experts, strict=True)]
        self.offsets = tuple(sum(widths[:level]) for level in range(len(widths)))
        self.total = sum(widths)
        for level, width in zip(chain.levels[1:], widths, strict=False):
            if width > MAX_TABLE_NODES:
                raise ValueError(
                    f"level {level.name!r} needs a table of {width} nodes (limit {MAX_TABLE_NODES}); give its nodes "
                    "one dense key of their own, pass the exact counts of its keys, or pass kernels=False"
                )
        padded = triton.next_power_of_2(p)
        self.layout = {"LEVELS": self.levels, "P": p, "PADDED": padded, "BLOCK": max(1, NODE_TILE // padded)}
        self.place: Tensor | None = None
        self.coarse: Tensor | None = None

    @property
    def integers(self) -> int:
        """Return how many integers `place_in` needs."""
        return 1 + 2 * self.total if self.levels > 1 else 0

    def place_in(self, zeros: Tensor) -> None:
        """Take memory for the flag and the spans of coarser nodes, int32 [integers]."""
        self.flag, self.reach = zeros[:1], zeros[1:]

    @property
    def gated(self) -> GatedTree | None:
        """Return the gates of every level where the host holds them: never here."""
        return None

    def gate(self, sums: Tensor, parents: Tensor | None) -> Tensor:
        """Return S+, S- and the summed log base weight [3, base_nodes, P] from the reduced sums [4, base_nodes, P]."""
        self.sums = sums
        if self.levels > 1:
            self._place(parents)
            self.coarse = self._sum_up(sums, None, 4)
        values = self._finest(3, self.dtype)
        self.stopped = self._finest(2 * self.levels, torch.float64)
        budgets = tuple(bound for level in self.chain.levels for bound in level.budget.others)
        table, starts, widths, sources = self._budgets()
        tables = (sums, self.coarse, self.place, values, self.stopped, table, self.experts, starts, widths)
        constants = {"BUDGETS": budgets, "SOURCES": sources, "K_MAX": None if self.k_max is None else float(self.k_max)}
        self._each_finest(node_kernels.gate_nodes, *tables, self.nodes.base_nodes, self.total, **constants)
        return values

    def adjoin(self, sums: Tensor) -> Tensor:
        """Return what tokens of each channel receive, [2, base_nodes, P], from W and the clipped parts [3, base_nodes,
        P]."""
        coarse = self._sum_up(sums, self.stopped, 3) if self.levels > 1 else None
        values = self._finest(2, self.dtype)
        tables = (sums, coarse, self.sums, self.coarse, self.place, self.stopped, values, self.experts)
        self._each_finest(node_kernels.adjoin_nodes, *tables, self.nodes.base_nodes, self.total)
        return values

    def _budgets(self) -> tuple[Tensor | None, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """C+ and C- of levels whose nodes have budgets of their own, each a row per entry of a source level's table.

        The source is the first level, from the one with the budgets on, whose keys have the key that they go by.
        Returned are the rows (None if no level has such budgets), where each level's would begin if its source's
        table began at 0, their width, and the source (-1 for a level with one budget).
        """
        rows: list[Tensor] = []
        starts, widths, sources = [0] * self.levels, [0] * self.levels, [-1] * self.levels
        for at, level in enumerate(self.chain.levels):
            by = level.budget.by
            if by is None:
                continue
            source = next(s for s in range(at, self.levels) if by in self.chain.levels[s].keys)
            nodes, p = self.nodes, self.nodes.partitions
            expert = source == 0 or self.experts[source - 1] > 0
            width = (nodes.base_nodes if source == 0 else self.counts[source - 1]) * (p if expert else 1)
            stride = 1 if by == EXPERT_KEY else self._strides(self.chain.levels[source].keys, expert)[by]
            size = p if by == EXPERT_KEY else nodes.sizes[by]
            of_id = level.budget.table(size, nodes.labels.get(by)).to(self.sums.device)
            ids = torch.arange(width, device=self.sums.device) // stride % size
            starts[at] = sum(row.numel() for row in rows) - (self.offsets[source - 1] if source else 0)
            widths[at], sources[at] = width, source
            rows.append(of_id.index_select(1, ids).reshape(-1))
        return (torch.cat(rows) if rows else None), tuple(starts), tuple(widths), tuple(sources)

    def _strides(self, level: Sequence[str], expert: bool) -> dict[str, int]:
        """How far one id of each key moves an entry of a level's table; 0 for keys that are not the level's."""
        nodes = self.nodes
        stride, of_key = nodes.partitions if expert else 1, dict.fromkeys(self._keys, 0)
        for key in reversed([key for key in level if key != EXPERT_KEY]):
            of_key[key] = stride
            stride *= nodes.sizes[key]
        return of_key

    @property
    def _keys(self) -> tuple[str, ...]:
        return (*self.chain.base_keys, *self.chain.parent_keys)

    def _place(self, parents: Tensor | None) -> None:
        nodes, keys = self.nodes, self._keys
        strides: list[int] = []
        for level, expert in zip(self.chain.levels[1:], self.experts, strict=True):
            strides += self._strides(level.keys, expert > 0).values()
        device = self.sums.device
        self.place = torch.empty((self.levels - 1, nodes.base_nodes), dtype=torch.int64, device=device)
        sizes = tuple(nodes.sizes[key] for key in keys)
        tables = (self.sums, parents, self.place, self.reach, self.flag, sizes, tuple(strides), self.offsets)
        self._each_finest(
            node_kernels.place_nodes, *tables, nodes.base_nodes, self.total, BASE=len(self.chain.base_keys)
        )

    def _sum_up(self, sums: Tensor, stopped: Tensor | None, rows: int) -> Tensor:
        out = torch.empty((rows, self.total), dtype=torch.float64, device=sums.device)
        launch(
            node_kernels.sum_up,
            (max(self.counts), self.levels - 1),
            sums,
            stopped,
            self.place,
            self.reach,
            out,
            self.flag,
            self.counts,
            self.offsets,
            self.experts,
            self.nodes.base_nodes,
            self.total,
            ADJOINT=stopped is not None,
            ROWS=rows,
            **layout_of(NODE_RANGES),
            **self.layout,
        )
        return out

    def _finest(self, rows: int, dtype: torch.dtype) -> Tensor:
        shape = (rows, self.nodes.base_nodes, self.nodes.partitions)
        return torch.empty(shape, dtype=dtype, device=self.sums.device)

    def _each_finest(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        programs = triton.cdiv(self.nodes.base_nodes, self.layout["BLOCK"])
        launch(kernel, (programs,), *arguments, **constants, **self.layout)


class HostTree:
    """Holds the nodes of one call's tree of levels; the tokens are of `dtype`.

    The chains of a tree differ in length, so that its nodes fit no dense tables of levels. They are few: the host gates
    them with the torch code, for two more waits.
    """

    integers = 0

    def __init__(self, rule: FiberPO, nodes: NodeMap, dtype: torch.dtype) -> None:
        self.rule, self.nodes, self.like = rule, nodes, torch.empty(0, dtype=dtype)

    @property
    def gated(self) -> GatedTree:
        """Return the gates of every level."""
        return self.gating.gated_tree

    def place_in(self, zeros: Tensor) -> None:
        """Take the flag, which is empty: `gate` raises for levels that do not nest."""
        self.flag = zeros

    def gate(self, sums: Tensor, parents: Tensor | None) -> Tensor:
        """Return what `DeviceTree.gate` does. Raises ValueError, on every rank alike, where levels do not nest."""
        tables = sums.cpu(), None if parents is None else parents.cpu()
        self.gating = self.rule.prepare(self.nodes, *tables, self.like)
        return self.gating.node_values.to(sums.device)

    def adjoin(self, sums: Tensor) -> Tensor:
        """Return what `DeviceTree.adjoin` does."""
        return self.gating.adjoint(sums.cpu()).to(sums.device)
