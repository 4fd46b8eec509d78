"""Find the token whose gradient is largest for its weight and advantage, and the node that made it so.

Without gates |c| / (mu |A|) is the importance ratio. In rollback a node's gradient is multiplied by up to its number of
tokens, so that a few tokens can carry a step. c is known after the second reduction only: what is found is this rank's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.gates import PLUS, GatedTree, spread
from fiberpo_megatron.fibration.levels import EXPERT_KEY
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.rule import Chunk
from fiberpo_megatron.fibration.tree import node_ids

TOKEN = "token"
FEW = 1024
"""Tokens with the same value that are looked at one by one."""
HUGE = 1e38
"""What stands for mu A where that is zero."""


@dataclass(frozen=True)
class Amplification:
    """Says how large |c| / (mu |A|) is at most on a rank, and which level contributes most to that token's c.

    Among tokens with the same value, the one in the first of the finest nodes counts, and among these the one with the
    first level: that does not depend on the layout, nor on the order of the tokens.
    """

    value: float
    level: str
    """Name of the level; "token" where the token's own gradient is the larger part."""
    node: Mapping[str, int]
    """Ids of the level's node by key; of the finest node for a token."""
    order: tuple[int, int]
    """Number of the finest node, and the level's place among the objective's levels, after which comes "token"."""


class Largest:
    """Collects, chunk by chunk, the tokens of the largest |c| / (mu |A|) that lie in the first of the finest nodes."""

    def __init__(self) -> None:
        self.value = 0.0
        self.base = -1
        self.tokens: list[Tensor] = []
        """Their places among the rank's tokens, int64."""
        self._zeros = False
        self._room: tuple[Tensor, Tensor] | None = None

    def add(self, chunk: Chunk, gradient: Tensor, base_of_run: Tensor) -> None:
        """Look at a chunk: its tokens' gradients c [n], and the base node of each of its runs [r]."""
        sizes, low, high = self._sizes(chunk, gradient)
        value = max(-low, high)
        if value < self.value or value == 0.0:
            return
        if value == self.value and int(base_of_run.min()) > self.base:
            return
        first, tied = _of_first_node(sizes.abs_() == value, chunk, base_of_run)
        if value > self.value or first < self.base:
            self.tokens = []
        elif first > self.base:
            return
        self.value, self.base = value, first
        self.tokens.append(tied + chunk.tokens.start)

    def _sizes(self, chunk: Chunk, gradient: Tensor) -> tuple[Tensor, float, float]:
        """c / (mu A) [n], 0 for tokens without weight or advantage, and its extremes."""
        if self._room is None:
            self._room = torch.empty_like(gradient), torch.empty_like(gradient)
        scale, sizes = (room[: gradient.shape[0]] for room in self._room)
        torch.mul(chunk.weights, chunk.advantages, out=scale)
        if not self._zeros:
            low, high = map(float, torch.aminmax(torch.div(gradient, scale, out=sizes)))
            if -low < torch.inf and high < torch.inf:
                return sizes, low, high
        self._zeros = True  # in this chunk, and most likely in others
        scale.add_(torch.eq(scale, 0.0, out=sizes), alpha=HUGE)  # a mask of booleans takes several times as long
        low, high = map(float, torch.aminmax(torch.div(gradient, scale, out=sizes)))
        return sizes, low, high


def _of_first_node(chosen: Tensor, chunk: Chunk, base_of_run: Tensor) -> tuple[int, Tensor]:
    """Among the tokens that `chosen` [n] marks, the first base node, and the places of those in it."""
    ends = chunk.runs.lengths.cumsum(0)
    if int(chosen.sum()) <= FEW:
        places = chosen.nonzero().squeeze(1)
        base = base_of_run[torch.searchsorted(ends, places, right=True)]
        first = int(base.min())
        return first, places[base == first]
    for first in base_of_run.unique().tolist():  # almost every run has some
        runs = (base_of_run == first).nonzero().squeeze(1).tolist()
        spans = [(int(ends[run] - chunk.runs.lengths[run]), int(ends[run])) for run in runs]
        found = [chosen[begin:end].nonzero().squeeze(1) + begin for begin, end in spans]
        if any(part.numel() for part in found):
            break
    return first, torch.cat(found)


def origin(
    nodes: NodeMap,
    gated: GatedTree,
    received: Sequence[Tensor] | None,
    parents: Tensor | None,
    value: float,
    base: int,
    push: Tensor,
    positive: Tensor,
    share: Tensor | None,
) -> Amplification:
    """Return where the largest amplification came from.

    Args:
        nodes: the finest nodes.
        gated: the gates of every level.
        received: what tokens receive through each level (`gates.received_by_level`); None if nothing.
        parents: ids of the coarser levels' nodes, as `tree.parent_tables` packs them.
        value: the largest |c| / (mu |A|).
        base: the base node of its tokens, of which there are k:
        push: their c / mu, [k].
        positive: whether their log ratio is at least 0, [k].
        share: their expert shares [k, P]; None without experts.
    """
    tree = gated.tree.of
    places, partition = len(tree.levels), 0
    kernel = _kernel(share, nodes, push)
    if received is not None:
        at = slice(base * nodes.partitions, (base + 1) * nodes.partitions)
        spreads = [gated.tree.dense(spread(gated, level, received[level])) for level in range(places)]
        parts = torch.stack([it[:, at] for it in spreads])  # [levels, 2, P]
        channels = torch.where(positive, PLUS, 1 - PLUS)
        given = kernel.unsqueeze(0) * parts[:, channels]  # [levels, k, P]
        through = given.sum(2)
        terms = torch.cat([through, (push - through.sum(0)).unsqueeze(0)]).abs()
        first = _first_largest(terms)
        places = int(first.min())
        if places < len(tree.levels):
            partition = int(_first_largest(given[places, first == places].abs().t()).min())
    elif share is not None:
        partition = int(_first_largest(kernel.t()).min())
    branch, ids = node_ids(tree, nodes, base * nodes.partitions + partition, parents)
    own = places < len(tree.levels)
    level = tree.levels[places if own else tree.branches[branch].levels[0]]
    node = {key: ids[key] for key in level.keys if own or key != EXPERT_KEY}
    return Amplification(value, level.name if own else TOKEN, node, (base, places))


def _kernel(share: Tensor | None, nodes: NodeMap, push: Tensor) -> Tensor:
    if share is None:
        return push.new_ones((push.shape[0], 1), dtype=torch.float64)
    if nodes.soft:
        return share.double()
    return torch.zeros_like(share, dtype=torch.float64).scatter_(1, share.argmax(dim=1, keepdim=True), 1.0)


def _first_largest(values: Tensor) -> Tensor:
    """The first row [C] in which each column of [R, C] is largest."""
    rank = torch.arange(values.shape[0], 0, -1, device=values.device).unsqueeze(1)
    return ((values == values.amax(0)) * rank).argmax(0)
