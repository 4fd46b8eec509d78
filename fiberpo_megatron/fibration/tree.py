"""Build the node tree of a mini-batch: compact nodes per level, parents, and aggregates of both channels.

Only the finest level's sums cross ranks. Every coarser aggregate follows from the tower property
(arXiv:2603.08239: aggregates are conditional expectations, so coarsening in steps changes nothing),
and every rank computes it from the same reduced table in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fiberpo_megatron.fibration.exact import COUNT, LARGEST_ADVANTAGE, MOST_TERMS, WEIGHT, Range, sum_by_index
from fiberpo_megatron.fibration.levels import EXPERT_KEY, Level, LevelTree
from fiberpo_megatron.fibration.membership import NodeMap, combine_ids
from fiberpo_megatron.fibration.tokens import MAX_LOG_RATIO

DRIFT = Range.covering(MAX_LOG_RATIO)
NODE_RANGES = (WEIGHT, COUNT, DRIFT, DRIFT)
"""The ranges of mu, 1, mu x+ and mu x-."""
ADJOINT = Range.covering(LARGEST_ADVANTAGE * math.exp(MAX_LOG_RATIO) * MOST_TERMS**2)
"""The range of k W over a level's nodes: both k and W = sum mu A G are sums over tokens."""


@dataclass(frozen=True)
class LevelNodes:
    """Holds the n nodes of one level that hold tokens; float64."""

    level: Level
    members: Tensor | None
    """The finest nodes whose chain has this level, int64 [m]; None for all."""
    of_member: Tensor
    """This level's node of each of them, int64 [m]."""
    parent: Tensor | None
    """The node of the next coarser level, int64 [n]; None at a root."""
    mass: Tensor
    """M_n = sum_i mu_i K(i, n), [n]."""
    tokens: Tensor
    """k_n = max(1, sum_i K(i, n)), [n]."""
    aggregate: Tensor
    """S+ and S-, [2, n]."""
    budget: Tensor
    """C+ and C-, [2, n], or [2, 1] where all nodes have the same."""

    def total(self, finest: Tensor) -> Tensor:
        """Return the sums of finest-node values [C, F] over this level's nodes: [C, n]."""
        own = finest if self.members is None else finest.index_select(-1, self.members)
        return _sums(own, self.of_member, self.mass.shape[0], (ADJOINT,) * own.shape[0])

    def add_to(self, finest: Tensor, values: Tensor) -> None:
        """Add this level's node values [..., n] to those of its finest nodes, [..., F], in place."""
        own = values.index_select(-1, self.of_member)
        if self.members is None:
            finest += own
        else:
            finest.index_add_(-1, self.members, own)


@dataclass(frozen=True)
class Leaves:
    """Holds the finest nodes of one branch, and the nodes of its finest level that they are (a level may be the finest
    of one branch and a coarser one of another)."""

    level: int
    finest: Tensor
    """int64 [m]"""
    node: Tensor
    """int64 [m]"""


@dataclass(frozen=True)
class NodeTree:
    """Holds all levels, each before its parent, over the finest nodes that hold tokens."""

    of: LevelTree
    levels: tuple[LevelNodes, ...]
    leaves: tuple[Leaves, ...]
    """The finest nodes of each branch."""
    index: Tensor
    """Position of each finest node in the dense table [base_nodes * P], int64 [F]."""
    dense_size: int

    def dense(self, finest: Tensor) -> Tensor:
        """Return finest-node values [C, F] laid out densely [C, base_nodes * P]; zero where there is no token."""
        out = finest.new_zeros((finest.shape[0], self.dense_size))
        return out.index_copy_(1, self.index, finest)

    def finest_aggregate(self) -> Tensor:
        """Return S+ and S- of each finest node's own level, [2, F]: what the residuals of its tokens start from."""
        if len(self.leaves) == 1:
            return self.levels[0].aggregate
        out = self.levels[0].aggregate.new_zeros((2, self.index.shape[0]))
        for leaves in self.leaves:
            out.index_copy_(1, leaves.finest, self.levels[leaves.level].aggregate.index_select(1, leaves.node))
        return out


def parent_tables(nodes: NodeMap, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what must cross ranks so that all know each base node's coarser ids: [1 + 2 * keys, base_nodes].

    `ids` are those of each run, [R], per key that only coarser levels name. Row 0 counts reports of a base node; then
    per key the sum and the sum of squares of the reported ids. A rank reports a base node once, and once more for every
    run that disagrees with it, so that a violation inside a rank or across ranks shows as a variance on every rank
    alike.
    """
    if not ids:
        return {}
    base = nodes.base_of_run
    seen = {key: _last_id(base, ids[key], nodes.base_nodes) for key in ids}
    present = torch.zeros(nodes.base_nodes, dtype=torch.float64, device=base.device)
    present[base] = 1.0
    wrong = torch.zeros(base.shape[0], dtype=torch.bool, device=base.device)
    for key in ids:
        wrong |= seen[key][base] != ids[key]
    odd = base[wrong]
    rows = [present.clone().index_add_(0, odd, torch.ones_like(odd, dtype=torch.float64))]
    for key in ids:
        reported, disagreeing = seen[key].double(), ids[key][wrong].double()
        rows.append(reported.clone().index_add_(0, odd, disagreeing))
        rows.append(reported.square().index_add_(0, odd, disagreeing.square()))
    return {"parents": torch.stack(rows)}


def build_tree(tree: LevelTree, nodes: NodeMap, sums: Tensor, parents: Tensor | None) -> NodeTree:
    """Return the nodes of all levels from the reduced finest sums [4, base_nodes, P]: mass, tokens, mu x+, mu x-.

    Raises ValueError, on every rank alike, when a level is not nested in the next.
    """
    flat = sums.reshape(4, -1)
    index = (flat[0] > 0).nonzero().squeeze(1)
    finest = flat.index_select(1, index)
    branch, ids, sizes = _finest_ids(tree, nodes, index, parents)
    of_branch = [torch.arange(index.shape[0], device=index.device)]
    if branch is not None:
        of_branch = [(branch == at).nonzero().squeeze(1) for at in range(len(tree.branches))]
    placed = [_place(tree, at, of_branch, ids, sizes) for at in range(len(tree.levels))]
    levels = []
    for level, own in zip(tree.levels, placed, strict=True):
        parent = None
        if level.parent is not None:
            parent = _parent(tree, level, own, _of(own.members, placed[level.parent].of_finest), ids)
        held = finest if own.members is None else finest.index_select(1, own.members)
        total = _sums(held, own.of_member, own.size, NODE_RANGES)
        mass, tokens, aggregate = total[0], total[1].clamp(min=1.0), total[2:] / total[0]
        budget = _budget(level, own, nodes, ids, sizes)
        levels.append(LevelNodes(level, own.members, own.of_member, parent, mass, tokens, aggregate, budget))
    leaves = tuple(
        Leaves(chain.levels[0], finest_nodes, placed[chain.levels[0]].of_finest.index_select(0, finest_nodes))
        for chain, finest_nodes in zip(tree.branches, of_branch, strict=True)
    )
    return NodeTree(tree, tuple(levels), leaves, index, flat.shape[1])


def _sums(own: Tensor, node: Tensor, size: int, ranges: Sequence[Range]) -> Tensor:
    """The sums [C, size] of values [C, m] over nodes that have at least one of the m each."""
    if size == node.shape[0]:  # one each
        return torch.empty_like(own).index_copy_(1, node, own)
    return sum_by_index(own, node, size, ranges)


def node_ids(tree: LevelTree, nodes: NodeMap, index: int, parents: Tensor | None) -> tuple[int, dict[str, int]]:
    """Return the branch of one finest node, by its place in the dense table, and its ids by key."""
    at = torch.tensor([index], device=None if parents is None else parents.device)
    branch, ids, _ = _finest_ids(tree, nodes, at, parents)
    return 0 if branch is None else int(branch), {key: int(found) for key, found in ids.items()}


def _budget(level: Level, own: _Placed, nodes: NodeMap, ids: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    device, by = own.of_member.device, level.budget.by
    if by is None:
        return torch.tensor(level.budget.others, dtype=torch.float64, device=device).unsqueeze(1)
    number = own.of_member.new_zeros(own.size).index_copy_(0, own.of_member, _of(own.members, ids[by]))
    return level.budget.table(sizes[by], nodes.labels.get(by)).to(device).index_select(1, number)


class _Placed(NamedTuple):
    """Holds where the finest nodes lie in one level."""

    size: int
    """Nodes of the level."""
    members: Tensor | None
    of_member: Tensor
    """As in `LevelNodes`."""
    of_finest: Tensor
    """The level's node of each finest node, int64 [F]; 0 where the level is not in its chain."""


def _place(
    tree: LevelTree, at: int, of_branch: Sequence[Tensor], ids: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> _Placed:
    having, keys, finest = tree.members(at), tree.levels[at].keys, ids[EXPERT_KEY].shape[0]
    members = None if len(having) == len(tree.branches) else torch.cat([of_branch[branch] for branch in having])
    if len(having) == 1 and tree.branches[having[0]].levels[0] == at:  # each finest node is one of its nodes
        of_member = torch.arange(finest if members is None else members.shape[0], device=ids[EXPERT_KEY].device)
        count = of_member.shape[0]
    else:
        index = combine_ids(ids, keys, sizes, like=ids[EXPERT_KEY])
        names, of_member = torch.unique(_of(members, index), return_inverse=True)
        count = names.shape[0]
    if members is None:
        return _Placed(count, None, of_member, of_member)
    return _Placed(count, members, of_member, of_member.new_zeros(finest).index_copy_(0, members, of_member))


def _of(members: Tensor | None, values: Tensor) -> Tensor:
    return values if members is None else values.index_select(0, members)


def _last_id(base: Tensor, ids: Tensor, size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.int64, device=base.device)
    out[base] = ids
    return out


def _finest_ids(
    tree: LevelTree, nodes: NodeMap, index: Tensor, parents: Tensor | None
) -> tuple[Tensor | None, dict[str, Tensor], dict[str, int]]:
    """The branch of each finest node (None without a tree), and every key's id: decoded from its index, or read from
    the parent table. A key that the node's chain does not name has the id 0."""
    base = torch.div(index, nodes.partitions, rounding_mode="floor")
    ids = {EXPERT_KEY: index - base * nodes.partitions}
    branch = None
    if len(nodes.branches) > 1:
        first = torch.tensor(nodes.first_nodes[1:], device=base.device)
        branch = torch.searchsorted(first, base, right=True)
    for at, keys in enumerate(nodes.branches):
        rest = base - nodes.first_nodes[at]
        for key in reversed(keys):
            quotient = torch.div(rest, nodes.sizes[key], rounding_mode="floor")
            own = rest - quotient * nodes.sizes[key]
            ids[key] = own if branch is None else torch.where(branch == at, own, ids.get(key, 0))
            rest = quotient
    if parents is not None:
        table = parents.index_select(1, base)
        for row, key in enumerate(tree.parent_keys):
            agreed = _agreed_id(tree, key, table[0], table[1 + 2 * row], table[2 + 2 * row], branch, ids)
            for at, chain in enumerate(tree.branches):
                if key in chain.parent_keys:
                    ids[key] = agreed if branch is None else torch.where(branch == at, agreed, ids.get(key, 0))
    return branch, ids, {**nodes.sizes, EXPERT_KEY: nodes.partitions}


def _agreed_id(
    tree: LevelTree,
    key: str,
    reports: Tensor,
    total: Tensor,
    squares: Tensor,
    branch: Tensor | None,
    ids: Mapping[str, Tensor],
) -> Tensor:
    # Exact while (reports * id)^2 < 2**53; beyond, the slack keeps rounding from looking like a spread.
    spread = reports * squares - total.square()
    wrong = spread > 0.5 + 1e-15 * total.square()
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        chain = tree.branches[0 if branch is None else int(branch[at])]
        fine, *coarser = (tree.levels[level] for level in chain.levels)
        coarse = next(level for level in coarser if key in level.keys)
        raise ValueError(_not_nested(fine, coarse, at, ids, f"several values of {key!r}"))
    return (total / reports.clamp(min=1.0)).round().long()


def _parent(tree: LevelTree, level: Level, own: _Placed, coarse: Tensor, ids: Mapping[str, Tensor]) -> Tensor:
    parent = torch.zeros(own.size, dtype=torch.int64, device=coarse.device)
    parent[own.of_member] = coarse
    wrong = parent[own.of_member] != coarse
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        at = at if own.members is None else int(own.members[at])
        assert level.parent is not None
        above = tree.levels[level.parent]
        raise ValueError(_not_nested(level, above, at, ids, f"several nodes of {above.name!r}"))
    return parent


def _not_nested(fine: Level, coarse: Level, at: int, ids: Mapping[str, Tensor], what: str) -> str:
    node = ", ".join(f"{key} {int(ids[key][at])}" for key in fine.keys)
    return (
        f"level {fine.name!r} is not nested in level {coarse.name!r}: node ({node}) has tokens of {what}; "
        "correct the ids, or order the levels so that each node lies inside one node of the next"
    )
