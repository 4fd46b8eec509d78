"""Explain what one call of an objective did to single tokens: the gates of their nodes at every level, and their clip.

A call that was asked for metrics keeps a `CallTrace`. It costs nothing until `explain` is called, which looks at the
chosen tokens alone and talks to no other rank: the node sums that it reads were already summed over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fiberpo_megatron.fibration.gates import GatedTree
from fiberpo_megatron.fibration.levels import EXPERT_KEY
from fiberpo_megatron.fibration.membership import NodeMap, make_node_map
from fiberpo_megatron.fibration.passes import Passes
from fiberpo_megatron.fibration.rule import Clip, Gating, Rule
from fiberpo_megatron.fibration.runs import find_runs
from fiberpo_megatron.fibration.tokens import TokenBatch, check_values

PASS, ROLLBACK, ZEROED = 0, 1, 2
"""States of a gate: it hands the residual on, it turns back with the slope -k, or it is zero."""
STATES = ("pass", "rollback", "zeroed")


class Prepare(Protocol):
    """Gives the call's gating again, on the device on which the tokens are explained."""

    def __call__(self) -> Gating: ...


@dataclass(frozen=True)
class LevelGates:
    """Holds the gates of one level at the nodes of the tokens that were asked about; n nodes, q memberships."""

    level: str
    """The level's name."""
    keys: tuple[str, ...]
    """The keys that name its nodes."""
    ids: Tensor
    """int64 [keys, n]: each node's id of every key, as the call's `keys` numbered them; of "expert", the partition."""
    aggregate: Tensor
    """float64 [2, n]: S+ and S-."""
    residual: Tensor
    """float64 [2, n]: what the gate compares with the budget, S less that of the node of the next coarser level."""
    budget: Tensor
    """float64 [2, n]: C+ and C-."""
    tokens: Tensor
    """float64 [n]: k, the number of tokens that sets the slope of rollback."""
    state: Tensor
    """int64 [2, n]: PASS, ROLLBACK or ZEROED, per channel."""
    token: Tensor
    """int64 [q]: which of the tokens belongs ..."""
    node: Tensor
    """int64 [q]: ... to which of the nodes, ..."""
    share: Tensor
    """float64 [q]: ... and by how much: 1, except for expert partitions."""


@dataclass(frozen=True)
class Explanation:
    """Holds what happened to m tokens in one call, on the host."""

    levels: list[LevelGates]
    """The gated levels, fine to coarse; empty for an objective without any."""
    gated_ratio: Tensor
    """[m] G."""
    free: Tensor | None
    """bool [m]: whether the token's own clip let its gradient through; None for an objective that clips no token."""
    clip: Clip | None
    """The bounds of that clip, [m] each; None for an objective that names none."""


@dataclass(frozen=True)
class CallTrace:
    """Holds what a call knew when it gated its tokens."""

    rule: Rule
    batch: TokenBatch
    """All tokens of the call on this rank."""
    sizes: Mapping[str, int]
    """Number of ids of each key over all ranks; empty for an objective without nodes."""
    prepare: Prepare
    device: torch.device
    """Where the node sums are."""

    def explain(self, index: Tensor) -> Explanation:
        """Return what happened to the tokens at `index` (int64 [m], places among the call's tokens on this rank)."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return self._explain(_selected(self.batch, index.to(self.batch.log_ratio.device), self.device))

    def _explain(self, batch: TokenBatch) -> Explanation:
        rule, gating = self.rule, self.prepare()
        keys = tuple(batch.ids)
        runs = find_runs(batch, keys)
        nodes = make_node_map(rule, batch, runs.ids, dict(self.sizes), runs.starts) if self.sizes else None
        passes = Passes(rule, batch, check_values(batch, rule.max_log_ratio), runs, nodes)
        ratio, free, clips = torch.empty_like(batch.log_ratio), [], []
        for chunk in passes.chunks():
            values = [] if nodes is None else passes.gather(gating.node_values, chunk)
            gated = gating.gate(chunk, values)
            ratio[chunk.tokens] = gated.ratio
            free.append(gated.free)
            clips.append(gating.clip(chunk, values))
        levels: list[LevelGates] = []
        if gating.gated_tree is not None and nodes is not None:
            base = nodes.base_of_run.repeat_interleave(runs.lengths)
            kernel = nodes.kernel(slice(0, batch.size))
            levels = _levels(gating.gated_tree, nodes, batch, base, kernel)
        known = [one for one in free if one is not None]
        return Explanation(
            levels,
            ratio.cpu(),
            torch.cat(known).cpu() > 0 if known else None,
            _joined([one for one in clips if one is not None]),
        )


def _selected(batch: TokenBatch, index: Tensor, device: torch.device) -> TokenBatch:
    def of(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, index).to(device)

    return replace(
        batch,
        log_ratio=of(batch.log_ratio),
        advantages=of(batch.advantages),
        weights=of(batch.weights),
        ids={key: of(ids) for key, ids in batch.ids.items()},
        expert_share=None if batch.expert_share is None else of(batch.expert_share),
        labels={key: label.to(device) for key, label in batch.labels.items()},
        old_log_probs=None if batch.old_log_probs is None else of(batch.old_log_probs),
    )


def _joined(clips: list[Clip]) -> Clip | None:
    if not clips:
        return None
    parts = [(clip.figure, clip.value, clip.low, clip.high) for clip in clips]
    figure, value, low, high = (torch.cat(list(column)).cpu() for column in zip(*parts, strict=True))
    return Clip(clips[0].figures, figure, value, low, high)


def _levels(
    gated: GatedTree, nodes: NodeMap, batch: TokenBatch, base: Tensor, kernel: Tensor | None
) -> list[LevelGates]:
    """The gates of each level at the nodes of the tokens, whose base nodes are `base` and shares `kernel`."""
    tree = gated.tree
    if kernel is None:
        token, partition = torch.arange(batch.size, device=base.device), torch.zeros_like(base)
        share = torch.ones_like(base, dtype=torch.float64)
    else:
        token, partition = (kernel > 0).nonzero(as_tuple=True)
        share = kernel[token, partition].double()
    dense = base[token] * nodes.partitions + partition
    place = torch.searchsorted(tree.index, dense).clamp(max=max(0, tree.index.shape[0] - 1))
    known = tree.index[place] == dense if tree.index.numel() else torch.zeros_like(dense, dtype=torch.bool)
    token, partition, share, place = token[known], partition[known], share[known], place[known]
    found = []
    for own, level in zip(tree.levels, gated.levels, strict=True):
        of_finest = own.of_member
        if own.members is not None:
            of_finest = torch.full_like(tree.index, -1).index_copy_(0, own.members, own.of_member)
        node = of_finest[place]
        inside = node >= 0
        pairs = torch.stack([token[inside], node[inside]])
        belongs, merged = torch.unique(pairs, dim=1, return_inverse=True)  # several partitions lie in one coarse node
        shares = share.new_zeros(belongs.shape[1]).index_add_(0, merged, share[inside])
        which, order = torch.unique(belongs[1], return_inverse=True)
        any_token, any_partition = torch.zeros_like(which), torch.zeros_like(which)
        any_token[order[merged]], any_partition[order[merged]] = token[inside], partition[inside]
        ids = [any_partition if key == EXPERT_KEY else batch.ids[key].long()[any_token] for key in own.level.keys]
        aggregate, residual = own.aggregate[:, which], own.aggregate[:, which]
        if own.parent is not None and own.level.parent is not None:
            residual = residual - tree.levels[own.level.parent].aggregate[:, own.parent[which]]
        budget = own.budget.expand(2, own.mass.shape[0])[:, which]
        slope = level.slope[:, which]
        state = torch.where(slope > 0, PASS, torch.where(slope < 0, ROLLBACK, ZEROED))
        tokens = own.tokens[which]
        facts = (torch.stack(ids), aggregate, residual, budget, tokens, state, belongs[0], order, shares)
        found.append(LevelGates(own.level.name, own.level.keys, *(fact.cpu() for fact in facts)))
    return found
