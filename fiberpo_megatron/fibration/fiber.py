"""The fibred objectives: FiberPO, FiberPO-Domain, both expert presets and any nested chain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.gates import GatedTree, adjoint, gate_tree
from fiberpo_megatron.fibration.levels import LevelChain
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.rule import Chunk, Epsilon, GatedChunk, Gating, Rule, equal
from fiberpo_megatron.fibration.tree import build_tree

UNBOUNDED = 1e30


@dataclass(frozen=True)
class Overlays:
    """Optional departures from the paper's objective that published training code has."""

    dual_clip: float | None = None
    """c: tokens with A < 0 and x > 0 use max(r A, c A); upper clip bounds are lifted for A < 0."""
    unclip_positive: bool = False
    """Tokens with A > 0 and x < 0 use r A."""


class FiberRule(Rule):
    """Gates at every level of a chain and a clip in the fiber (arXiv:2604.03044, equation 2)."""

    has_nodes = True
    node_terms = 4
    adjoint_terms = 3

    def __init__(self, chain: LevelChain, epsilon: Epsilon, overlays: Overlays) -> None:
        self.chain = chain
        self.epsilon = epsilon
        self.overlays = overlays
        self.base_keys = chain.base_keys
        self.parent_keys = chain.parent_keys
        self.level_names = tuple(level.name for level in chain.levels)
        self.uses_experts = chain.uses_experts
        self.soft = chain.soft
        self.spans_micro_batches = not chain.inside_trajectory

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """mu, 1, mu x+ and mu x-: what equation 3 of arXiv:2604.03044 averages, per channel."""
        x, mu = chunk.log_ratio, chunk.weights
        return mu, chunk.counted, x.clamp(min=0.0).mul_(mu), x.clamp(max=0.0).mul_(mu).neg_()

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        assert nodes is not None and sums is not None
        gated = gate_tree(build_tree(self.chain, nodes, sums, parents))
        return FiberGating(self, gated, (nodes.base_nodes, nodes.partitions), like)


class FiberGating(Gating):
    """One call's gates; per finest node S+, S- and the summed log base weight."""

    gated_tree: GatedTree

    def __init__(self, rule: FiberRule, gated: GatedTree, shape: tuple[int, int], like: Tensor) -> None:
        self.rule = rule
        self.gated_tree = gated
        self.shape = shape
        self.dtype = like.dtype
        finest = torch.cat([gated.tree.levels[0].aggregate, gated.log_weight.unsqueeze(0)])
        self.node_values = self._dense(finest)

    def _dense(self, finest: Tensor) -> Tensor:
        return self.gated_tree.tree.dense(finest).view(-1, *self.shape).to(self.dtype)

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        """log G = clip(x - l S_same) - clip(-l S_opp) + sum of log base weights (equation 2)."""
        s_plus, s_minus, log_weight = values
        p, q = chunk.positive, chunk.negative
        # l S_same and -l S_opp without branches: one of the two products is exactly zero.
        own = chunk.log_ratio - (p * s_plus).sub_(q * s_minus)
        other = (q * s_plus).sub_(p * s_minus)
        own_clipped, other_clipped = self._clip(own, chunk), self._clip(other, chunk)
        own_free, other_free = equal(own_clipped, own), equal(other_clipped, other)
        ratio = own_clipped.sub_(other_clipped).add_(log_weight).exp_()
        scale = chunk.weights * chunk.advantages
        weight = scale * ratio
        gradient, free = weight * own_free, own_free
        if self.rule.overlays.dual_clip is not None or self.rule.overlays.unclip_positive:
            ratio, gradient, free, weight = self._overlay(chunk, scale, ratio, gradient, free, weight)
        # What stops S+'s gradient: a token's own clip where x >= 0, else its other clip; S- the other way.
        stopped_plus = weight - (p * own_free).addcmul_(q, other_free).mul_(weight)
        stopped_minus = weight - (p * other_free).addcmul_(q, own_free).mul_(weight)
        return GatedChunk(ratio, gradient, free, (weight, stopped_plus, stopped_minus))

    def _clip(self, value: Tensor, chunk: Chunk) -> Tensor:
        gain, loss = self.rule.epsilon
        lifted = self.rule.overlays.dual_clip is not None
        if gain == loss and not lifted:
            return value.clamp(-gain, gain)
        positive = torch.gt(chunk.advantages, 0.0, out=torch.empty_like(value))
        bound = positive * gain + (1.0 - positive) * loss
        upper = bound
        if lifted:
            upper = bound + UNBOUNDED * (chunk.advantages < 0).to(self.dtype)
        return torch.minimum(torch.maximum(value, -bound), upper)

    def _overlay(
        self, chunk: Chunk, scale: Tensor, ratio: Tensor, gradient: Tensor, free: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens on the raw ratio leave the fibration: they hand nothing to the aggregates."""
        x, advantages = chunk.log_ratio, chunk.advantages
        raw = chunk.ratio
        on_raw = torch.zeros_like(x, dtype=torch.bool)
        raw_gated = raw
        if self.rule.overlays.dual_clip is not None:
            on_raw |= (advantages < 0) & (x > 0)
            raw_gated = torch.where(on_raw, raw.clamp(max=self.rule.overlays.dual_clip), raw)
        if self.rule.overlays.unclip_positive:
            on_raw |= (advantages > 0) & (x < 0)
        raw_free = (raw_gated == raw).to(self.dtype)
        return (
            torch.where(on_raw, raw_gated, ratio),
            torch.where(on_raw, scale * raw * raw_free, gradient),
            torch.where(on_raw, raw_free, free),
            weight.masked_fill(on_raw, 0.0),
        )

    def adjoint(self, sums: Tensor) -> Tensor | None:
        flat = sums.reshape(3, -1).index_select(1, self.gated_tree.tree.index)
        return self._dense(adjoint(self.gated_tree, flat[0], flat[1:]))

    def finish(self, chunk: Chunk, values: list[Tensor]) -> Tensor:
        received_plus, received_minus = values
        return (chunk.positive * received_plus).add_(chunk.negative * received_minus).mul_(chunk.weights)
