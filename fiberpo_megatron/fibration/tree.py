"""Build the node tree of a mini-batch: compact nodes per level, parents, and aggregates of both channels.

Only the finest level's sums cross ranks. Every coarser aggregate follows from the tower property
(arXiv:2603.08239: aggregates are conditional expectations, so coarsening in steps changes nothing),
and every rank computes it from the same reduced table in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.levels import EXPERT_KEY, Level, LevelChain
from fiberpo_megatron.fibration.membership import NodeMap, combine_ids
from fiberpo_megatron.fibration.runs import Runs


@dataclass(frozen=True)
class LevelNodes:
    """Holds the n nodes of one level that hold tokens; float64."""

    level: Level
    of_finest: Tensor
    """This level's node of each finest node, int64 [F]."""
    parent: Tensor | None
    """The node of the next coarser level, int64 [n]; None at the coarsest."""
    mass: Tensor
    """M_n = sum_i mu_i K(i, n), [n]."""
    tokens: Tensor
    """k_n = max(1, sum_i K(i, n)), [n]."""
    aggregate: Tensor
    """S+ and S-, [2, n]."""

    def total(self, finest: Tensor) -> Tensor:
        """Return the sums of finest-node values [..., F] over this level's nodes: [..., n]."""
        out = finest.new_zeros((*finest.shape[:-1], self.mass.shape[0]))
        return out.index_add_(-1, self.of_finest, finest)


@dataclass(frozen=True)
class NodeTree:
    """Holds all levels, fine to coarse, over the finest nodes that hold tokens."""

    levels: tuple[LevelNodes, ...]
    index: Tensor
    """Position of each finest node in the dense table [base_nodes * P], int64 [F]."""
    dense_size: int

    def dense(self, finest: Tensor) -> Tensor:
        """Return finest-node values [C, F] laid out densely [C, base_nodes * P]; zero where there is no token."""
        out = finest.new_zeros((finest.shape[0], self.dense_size))
        return out.index_copy_(1, self.index, finest)


def parent_tables(nodes: NodeMap, runs: Runs, parent_keys: tuple[str, ...]) -> dict[str, Tensor]:
    """Return what must cross ranks so that all know each base node's coarser ids: [1 + 2 * keys, base_nodes].

    Row 0 counts reports of a base node; then per key the sum and the sum of squares of the reported
    ids. A rank reports a base node once, and once more for every run that disagrees with it, so
    that a violation inside a rank or across ranks shows as a variance on every rank alike.
    """
    if not parent_keys:
        return {}
    base = nodes.base_of_run
    seen = {key: _last_id(base, runs.ids[key], nodes.base_nodes) for key in parent_keys}
    present = torch.zeros(nodes.base_nodes, dtype=torch.float64, device=base.device)
    present[base] = 1.0
    wrong = torch.zeros(base.shape[0], dtype=torch.bool, device=base.device)
    for key in parent_keys:
        wrong |= seen[key][base] != runs.ids[key]
    odd = base[wrong]
    rows = [present.clone().index_add_(0, odd, torch.ones_like(odd, dtype=torch.float64))]
    for key in parent_keys:
        reported, disagreeing = seen[key].double(), runs.ids[key][wrong].double()
        rows.append(reported.clone().index_add_(0, odd, disagreeing))
        rows.append(reported.square().index_add_(0, odd, disagreeing.square()))
    return {"parents": torch.stack(rows)}


def build_tree(chain: LevelChain, nodes: NodeMap, sums: Tensor, parents: Tensor | None) -> NodeTree:
    """Return the tree from the reduced finest sums [4, base_nodes, P]: mass, tokens, mu x+, mu x-.

    Raises ValueError, on every rank alike, when a level is not nested in the next.
    """
    flat = sums.reshape(4, -1)
    index = (flat[0] > 0).nonzero().squeeze(1)
    finest = flat.index_select(1, index)
    ids, sizes = _finest_ids(chain, nodes, index, parents)
    anchors, names = [torch.arange(index.shape[0], device=index.device)], []
    for level in chain.levels[1:]:
        name, anchor = torch.unique(combine_ids(ids, level.keys, sizes, like=index), return_inverse=True)
        anchors.append(anchor)
        names.append(name)
    counts = [index.shape[0], *(name.shape[0] for name in names)]
    levels = []
    for depth, level in enumerate(chain.levels):
        parent = None
        if depth + 1 < len(chain.levels):
            parent = _parent(chain, depth, anchors, counts[depth], ids)
        total = finest.new_zeros((4, counts[depth])).index_add_(1, anchors[depth], finest)
        levels.append(
            LevelNodes(level, anchors[depth], parent, total[0], total[1].clamp(min=1.0), total[2:] / total[0])
        )
    return NodeTree(tuple(levels), index, flat.shape[1])


def _last_id(base: Tensor, ids: Tensor, size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.int64, device=base.device)
    out[base] = ids
    return out


def _finest_ids(
    chain: LevelChain, nodes: NodeMap, index: Tensor, parents: Tensor | None
) -> tuple[Mapping[str, Tensor], dict[str, int]]:
    """Every key's id at each finest node, decoded from its index or read from the parent table."""
    base = torch.div(index, nodes.partitions, rounding_mode="floor")
    ids = {EXPERT_KEY: index - base * nodes.partitions}
    rest = base
    for key in reversed(nodes.keys):
        quotient = torch.div(rest, nodes.sizes[key], rounding_mode="floor")
        ids[key] = rest - quotient * nodes.sizes[key]
        rest = quotient
    if parents is not None:
        table = parents.index_select(1, base)
        for row, key in enumerate(chain.parent_keys):
            ids[key] = _agreed_id(chain, key, table[0], table[1 + 2 * row], table[2 + 2 * row], ids)
    return ids, {**nodes.sizes, EXPERT_KEY: nodes.partitions}


def _agreed_id(
    chain: LevelChain, key: str, reports: Tensor, total: Tensor, squares: Tensor, ids: Mapping[str, Tensor]
) -> Tensor:
    # Exact while (reports * id)^2 < 2**53; beyond, the slack keeps rounding from looking like a spread.
    spread = reports * squares - total.square()
    wrong = spread > 0.5 + 1e-15 * total.square()
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        coarse = next(level for level in chain.levels[1:] if key in level.keys)
        raise ValueError(_not_nested(chain.levels[0], coarse, at, ids, f"several values of {key!r}"))
    return (total / reports.clamp(min=1.0)).round().long()


def _parent(chain: LevelChain, depth: int, anchors: list[Tensor], count: int, ids: Mapping[str, Tensor]) -> Tensor:
    fine, coarse = anchors[depth], anchors[depth + 1]
    parent = torch.zeros(count, dtype=torch.int64, device=fine.device)
    parent[fine] = coarse
    wrong = parent[fine] != coarse
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        above = chain.levels[depth + 1]
        raise ValueError(_not_nested(chain.levels[depth], above, at, ids, f"several nodes of {above.name!r}"))
    return parent


def _not_nested(fine: Level, coarse: Level, at: int, ids: Mapping[str, Tensor], what: str) -> str:
    node = ", ".join(f"{key} {int(ids[key][at])}" for key in fine.keys)
    return (
        f"level {fine.name!r} is not nested in level {coarse.name!r}: node ({node}) has tokens of {what}; "
        "correct the ids, or order the levels so that each node lies inside one node of the next"
    )
