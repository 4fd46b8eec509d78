"""Find the finest node that a token belongs to; here are the two operations that cost a pass over tokens.

`NodeMap` sums token values into finest nodes with the membership kernel K and hands node values back
to tokens with the same kernel. A finest node is (base node, expert partition): the base node is given
by the finest level's keys without the expert, the partition by the routing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fiberpo_megatron.fibration.budgets import OTHERS
from fiberpo_megatron.fibration.exact import FloatSums, NodeSums
from fiberpo_megatron.fibration.levels import Choice, level_name
from fiberpo_megatron.fibration.runs import RunSlice
from fiberpo_megatron.fibration.shares import Shares, add_products, handed
from fiberpo_megatron.fibration.tokens import LONE, TokenBatch, table_size

if TYPE_CHECKING:
    from fiberpo_megatron.fibration.rule import Rule

MAX_TABLE_NODES = 1 << 24
LOOPED = 400
"""A token's products with node values are added up one by one if they are fewer than this."""


@dataclass(frozen=True)
class NodeMap:
    """Holds the finest nodes of this rank's tokens.

    The base nodes of each branch of a tree stand one after the other; without a tree there is one branch.
    """

    branches: tuple[tuple[str, ...], ...]
    """Per branch the keys of its base nodes, most significant first."""
    sizes: dict[str, int]
    """Number of ids per key, also of the keys only coarser levels name."""
    branch_of_run: Tensor | None
    """Branch of each run, int64 [R]; None without a tree."""
    base_of_run: Tensor
    """Base node of each run, int64 [R]."""
    share: Tensor | None
    """omega [N, P]; None without experts."""
    soft: bool
    partitions: int
    labels: Mapping[str, Tensor]
    """Per key, the number that each id has in budgets, where it is not the id itself; int64 [sizes[key]]."""
    expert_nodes: Tensor | None = None
    """The base nodes of the branches with experts, int64; None if all have some."""

    @property
    def base_nodes(self) -> int:
        return self.first_nodes[-1]

    @cached_property
    def first_nodes(self) -> list[int]:
        """Return the first base node of each branch, and the number of all."""
        return first_nodes(self.branches, self.sizes)

    @cached_property
    def shares(self) -> Shares:
        """Return the shares as products take them; there must be some."""
        assert self.share is not None
        return Shares(self.share, self.soft)

    def check_size(self) -> None:
        if self.base_nodes * self.partitions > MAX_TABLE_NODES:
            keys = max(self.branches, key=lambda keys: math.prod(self.sizes[key] for key in keys))
            raise ValueError(
                f"level {level_name(keys)!r} needs a table of {self.base_nodes} x {self.partitions} nodes "
                f"(limit {MAX_TABLE_NODES}); give its nodes one dense key of their own, or pass the exact "
                f"counts of {list(keys)} (they are {[self.sizes[key] for key in keys]} now)"
            )

    def kernel(self, tokens: slice) -> Tensor | None:
        """Return K(i, p) of a chunk, [n, P]: omega when soft, one-hot at its first maximum when hard."""
        return None if self.share is None else self.shares.kernel(tokens)

    def sum_into(self, sums: NodeSums, values: Sequence[Tensor | None], tokens: slice, runs: RunSlice) -> None:
        """Add sum_i K(i, n) value_i to C sums over [base_nodes, P], for C token values [n].

        None stands for ones, whose sum without experts is the length of the run.
        """
        base = self.base_of_run[runs.first : runs.end]
        kernel = self.kernel(tokens)
        if isinstance(sums, FloatSums):
            _sum_floats(sums.table, base, values, kernel, runs)
            return
        if kernel is None:
            for row, value in enumerate(values):
                if value is None:
                    sums.add(row, base, runs.lengths.double().unsqueeze(1))
                else:
                    sums.add_runs(row, base, value, runs)
            return
        add_products(sums, base, values, self.shares, tokens, runs)

    def gather(self, table: Tensor, tokens: slice, runs: RunSlice) -> list[Tensor]:
        """Return sum_n K(i, n) table[c, n] for each token of the chunk and each c of [C, base_nodes, P]."""
        base = self.base_of_run[runs.first : runs.end]
        if self.share is None:
            return [runs.spread(row.view(-1).index_select(0, base)) for row in table]
        if table.shape[0] * table.shape[2] < LOOPED and not table.is_cuda:
            return list(handed(table.transpose(0, 1).index_select(0, base), self.shares, tokens, runs))
        # No large matrix product: in one, a token's bits could depend on how many tokens there are.
        kernel = self.shares.kernel(tokens)
        return [runs.spread(row.index_select(0, base)).mul_(kernel).sum(1) for row in table]


def _sum_floats(
    table: Tensor, base: Tensor, values: Sequence[Tensor | None], kernel: Tensor | None, runs: RunSlice
) -> None:
    """Add to table [C, base_nodes, P] in float64."""
    if kernel is None:
        for row, value in zip(table, values, strict=True):
            row.view(-1).index_add_(0, base, runs.lengths.double() if value is None else runs.float_sums(value))
    elif runs.long_on_cpu:
        rows = [torch.ones_like(kernel[:, 0]) if value is None else value for value in values]
        stacked, wide = torch.stack(rows).double(), kernel.double()
        products = [stacked[:, start:end] @ wide[start:end] for start, end in runs.bounds]
        table.index_add_(1, base, torch.stack(products, dim=1))
    else:
        for row, value in zip(table, values, strict=True):
            row.index_add_(0, base, runs.float_sums(kernel if value is None else kernel * value.unsqueeze(1)))


def make_node_map(
    rule: Rule,
    batch: TokenBatch,
    ids: Mapping[str, Tensor],
    sizes: dict[str, int],
    starts: Tensor,
    base: Tensor | None = None,
) -> NodeMap:
    """Return the finest nodes and the one of every run.

    Args:
        rule: the objective.
        batch: this rank's tokens.
        ids: per key the id of each run, int64 [R], of which all lie within `sizes`.
        sizes: number of ids per key.
        starts: first token of each run, int64 [R].
        base: the base node of each run where a caller knows it; not used in a tree.

    Raises:
        ValueError: a table that is too large, or an id for which a tree has no branch.
    """
    labels = {key: _label_of_ids(label, sizes[key]) for key, label in batch.labels.items() if key in sizes}
    keys = tuple(branch.base_keys for branch in rule.branches)
    choice, branch, share, expert_nodes = rule.branch_choice, None, batch.expert_share, None
    if base is None or choice is not None:
        bases = [combine_ids(ids, base_keys, sizes, like=starts) for base_keys in keys]
        base = bases[0]
    if choice is not None:
        first = first_nodes(keys, sizes)
        branch = _branch_of_run(choice, ids, sizes, labels)
        base = torch.stack(bases).gather(0, branch.unsqueeze(0)).squeeze(0) + branch.new_tensor(first)[branch]
        has_experts = [it.uses_experts for it in rule.branches]
        if share is not None and not all(has_experts):
            # A token of a branch without experts belongs to one node alone, whatever its routing.
            routed = torch.tensor(has_experts, device=share.device)[branch]
            lengths = torch.diff(starts, append=starts.new_tensor([batch.size]))
            whole = torch.zeros_like(share[:1]).index_fill_(1, branch.new_zeros(1), 1.0)
            share = torch.where(routed.repeat_interleave(lengths).unsqueeze(1), share, whole)
            ranges = zip(itertools.pairwise(first), has_experts, strict=True)
            expert_nodes = torch.cat([torch.arange(*ends) for ends, has in ranges if has])
    nodes = NodeMap(keys, sizes, branch, base, share, rule.soft, batch.partitions, labels, expert_nodes)
    nodes.check_size()
    return nodes


def first_nodes(branches: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> list[int]:
    """Return the first base node of each branch, and the number of all."""
    return list(itertools.accumulate((math.prod(sizes[key] for key in keys) for keys in branches), initial=0))


def parent_ids(rule: Rule, nodes: NodeMap, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, per key that only coarser levels name, the id that each run [R] reports; 0 in branches without it."""
    if nodes.branch_of_run is None:
        return {key: ids[key] for key in rule.parent_keys}
    found = {}
    for key in rule.parent_keys:
        named = nodes.branch_of_run.new_tensor([int(key in branch.parent_keys) for branch in rule.branches])
        found[key] = ids[key] * named[nodes.branch_of_run]
    return found


def _branch_of_run(
    choice: Choice, ids: Mapping[str, Tensor], sizes: Mapping[str, int], labels: Mapping[str, Tensor]
) -> Tensor:
    size, label = sizes[choice.key], labels.get(choice.key)
    of_id = torch.full((size,), -1 if choice.others is None else choice.others)
    for number, at in choice.of_id.items():
        of_id[slice(number, number + 1) if label is None else label == number] = at
    branch = of_id.to(ids[choice.key].device)[ids[choice.key]]
    if bool((branch < 0).any()):
        bad = int(ids[choice.key][branch < 0][0])
        raise ValueError(
            f"levels by {choice.key!r} has no chain for {choice.key} {bad if label is None else int(label[bad])}; add "
            f"one, or {OTHERS!r} for all others"
        )
    return branch


def _label_of_ids(label: Tensor, size: int) -> Tensor:
    """A key's labels on the host, for `size` ids: a table is larger than the ids where ranks share it."""
    found = torch.full((size,), -1)
    known = label[:size].cpu()
    found[: known.shape[0]] = known
    return found


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
