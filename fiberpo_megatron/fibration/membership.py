"""Find the finest node that a token belongs to; here are the two operations that cost a pass over tokens.

`NodeMap` sums token values into finest nodes with the membership kernel K and hands node values back
to tokens with the same kernel. A finest node is (base node, expert partition): the base node is given
by the finest level's keys without the expert, the partition by the routing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.levels import level_name
from fiberpo_megatron.fibration.runs import Runs, RunSlice
from fiberpo_megatron.fibration.tokens import LONE, TokenBatch, table_size

MAX_TABLE_NODES = 1 << 24


@dataclass(frozen=True)
class NodeMap:
    """Holds the finest nodes of this rank's tokens."""

    keys: tuple[str, ...]
    """Keys of the base node, most significant first."""
    sizes: dict[str, int]
    """Number of ids per key, also of the keys only coarser levels name."""
    base_of_run: Tensor
    """Base node of each run, int64 [R]."""
    share: Tensor | None
    """omega [N, P]; None without experts."""
    soft: bool
    partitions: int

    @property
    def base_nodes(self) -> int:
        count = 1
        for key in self.keys:
            count *= self.sizes[key]
        return count

    def check_size(self) -> None:
        if self.base_nodes * self.partitions > MAX_TABLE_NODES:
            raise ValueError(
                f"level {level_name(self.keys)!r} needs a table of {self.base_nodes} x {self.partitions} nodes "
                f"(limit {MAX_TABLE_NODES}); give its nodes one dense key of their own, or pass the exact "
                f"counts of {list(self.keys)} (they are {[self.sizes[key] for key in self.keys]} now)"
            )

    def kernel(self, tokens: slice) -> Tensor | None:
        """Return K(i, p) of a chunk, [n, P]: omega when soft, one-hot at its first maximum when hard."""
        if self.share is None:
            return None
        share = self.share[tokens]
        if self.soft:
            return share
        partition = share.argmax(dim=1)  # the first of equal maxima: the lowest p wins a tie
        return torch.zeros_like(share).scatter_(1, partition.unsqueeze(1), 1.0)

    def sum_into(self, table: Tensor, values: Sequence[Tensor | None], tokens: slice, runs: RunSlice) -> None:
        """Add sum_i K(i, n) value_i to table [C, base_nodes, P] (float64) for C token values [n].

        None stands for ones, whose sum without experts is the length of the run.
        """
        base = self.base_of_run[runs.first : runs.end]
        kernel = self.kernel(tokens)
        if kernel is None:
            for row, value in zip(table, values, strict=True):
                sums = runs.lengths.double() if value is None else runs.sums(value)
                row.view(-1).index_add_(0, base, sums)
        elif runs.long_on_cpu:
            rows = [torch.ones_like(kernel[:, 0]) if value is None else value for value in values]
            stacked, wide = torch.stack(rows).double(), kernel.double()
            products = [stacked[:, start:end] @ wide[start:end] for start, end in runs.bounds]
            table.index_add_(1, base, torch.stack(products, dim=1))
        else:
            for row, value in zip(table, values, strict=True):
                row.index_add_(0, base, runs.sums(kernel if value is None else kernel * value.unsqueeze(1)))

    def gather(self, table: Tensor, tokens: slice, runs: RunSlice) -> list[Tensor]:
        """Return sum_n K(i, n) table[c, n] for each token of the chunk and each c of [C, base_nodes, P]."""
        base = self.base_of_run[runs.first : runs.end]
        kernel = self.kernel(tokens)
        if kernel is None:
            return [runs.spread(row.view(-1).index_select(0, base)) for row in table]
        if runs.long_on_cpu:
            rows = table.index_select(1, base).unbind(1)
            products = [row @ kernel[start:end].t() for row, (start, end) in zip(rows, runs.bounds, strict=True)]
            return list(torch.cat(products, dim=1))
        return [runs.spread(row.index_select(0, base)).mul_(kernel).sum(1) for row in table]


def make_node_map(
    batch: TokenBatch,
    runs: Runs,
    keys: tuple[str, ...],
    all_keys: tuple[str, ...],
    *,
    soft: bool,
    shared: bool,
) -> NodeMap:
    """Return the checked ids and the base node of every run; `all_keys` also names the coarser levels' keys."""
    sizes = {name: checked_size(name, id_range(runs.ids[name]), batch, shared=shared) for name in all_keys}
    base = combine_ids(runs.ids, keys, sizes, like=runs.lengths)
    nodes = NodeMap(keys, sizes, base, batch.expert_share, soft, batch.partitions)
    nodes.check_size()
    return nodes


def combine_ids(ids: Mapping[str, Tensor], keys: Sequence[str], sizes: Mapping[str, int], *, like: Tensor) -> Tensor:
    """Return one index from several ids, the first key most significant; zeros when there are no keys."""
    index = torch.zeros_like(like)
    for key in keys:
        index = index * sizes[key] + ids[key]
    return index


def checked_size(name: str, ends: tuple[int, int], batch: TokenBatch, *, shared: bool) -> int:
    """Return the number of ids of a key whose smallest and largest id here are `ends` ((0, -1) without tokens)."""
    low, high = ends
    size = table_size(name, high, batch.counts, shared=shared)
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        at = int((batch.ids[name] == bad).nonzero()[0])
        lone = name == batch.lone_key  # its ids from the number of nodes on were moved up by one
        raise ValueError(
            f"keys[{name!r}][{at}] is {bad - (lone and bad > 0)}, outside 0..{size - 1 - lone}; ids must be global, "
            f"dense and below counts[{name!r}]" + (f", or {LONE} for a token alone in its node" if lone else "")
        )
    return size


def id_range(ids: Tensor) -> tuple[int, int]:
    """Return the smallest and largest id; (0, -1) without any."""
    if ids.numel() == 0:
        return 0, -1
    low, high = torch.aminmax(ids)
    return int(low), int(high)
