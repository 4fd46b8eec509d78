"""Objectives with one ungated aggregate per trajectory: GSPO and APC-Obj."""

from __future__ import annotations

import torch
from torch import Tensor

from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.rule import Chunk, Epsilon, GatedChunk, Gating, Rule, equal, pessimistic_clip


class _TrajectoryRule(Rule):
    base_keys = (TRAJECTORY_KEY,)
    has_nodes = True
    node_terms = 2
    adjoint_terms = 1


class GSPORule(_TrajectoryRule):
    """One length-normalised ratio per trajectory, pessimistic clip (arXiv:2507.18071, equations 5 and 7)."""

    def __init__(self, epsilon: Epsilon) -> None:
        self.epsilon = epsilon

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        return chunk.counted, chunk.only_counted(chunk.log_ratio.clone())

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        assert sums is not None
        return _GSPOGating(self.epsilon, sums, like)


class _GSPOGating(Gating):
    def __init__(self, epsilon: Epsilon, sums: Tensor, like: Tensor) -> None:
        self.epsilon = epsilon
        self.tokens = sums[0].clamp(min=1.0)
        self.dtype = like.dtype
        self.node_values = (sums[1] / self.tokens).exp().unsqueeze(0).to(like.dtype)

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        ratio = pessimistic_clip(values[0], chunk.advantages, self.epsilon)
        free = equal(ratio, values[0])
        through = (chunk.weights * chunk.advantages).mul_(ratio).mul_(free)
        return GatedChunk(ratio, torch.zeros_like(ratio), free, (through,))

    def adjoint(self, sums: Tensor) -> Tensor | None:
        return (sums / self.tokens).to(self.dtype)

    def finish(self, chunk: Chunk, values: list[Tensor]) -> Tensor:
        """ds/dx_j = s / T: every token of a trajectory receives the same."""
        return chunk.only_counted(values[0])


class APCRule(_TrajectoryRule):
    """APC-Obj: G_i = 1 + clip(r_i - 1, -B_i, B_i), B_i = max(0, T delta - sum of the others' |r_j - 1|).

    arXiv:2603.08239 (Aggregational Policy Censoring Objective); T counts the trajectory's tokens. With
    slack = T delta - sum of all |r_j - 1|, G = r while slack >= 0 and |G_i - 1| = max(0, |r_i - 1| + slack)
    beyond.
    """

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        return chunk.counted, chunk.only_counted(torch.expm1(chunk.log_ratio).abs_())

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        assert sums is not None
        return _APCGating((sums[0] * self.delta - sums[1]).unsqueeze(0), like)


class _APCGating(Gating):
    def __init__(self, slack: Tensor, like: Tensor) -> None:
        self.dtype = like.dtype
        self.node_values: Tensor = slack.to(like.dtype)

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        change = torch.expm1(chunk.log_ratio)
        slack = values[0]
        free = torch.ge(slack, 0.0, out=torch.empty_like(slack))
        censored = (change.abs() + slack).clamp_(min=0.0).mul_(change.sign()).add_(1.0)
        free_ratio = chunk.ratio * free
        ratio = (1.0 - free).mul_(censored).add_(free_ratio)
        gradient = free_ratio.mul_(chunk.weights).mul_(chunk.advantages)
        return GatedChunk(ratio, gradient, free, (self._pushed(chunk, change, slack),))

    def _pushed(self, chunk: Chunk, change: Tensor, slack: Tensor) -> Tensor:
        """q_i = mu A sign(r_i - 1) where the bound B_i > 0 is what G_i follows."""
        follows = torch.gt(change.abs() + slack, 0.0, out=torch.empty_like(slack))
        follows.mul_(torch.lt(slack, 0.0, out=torch.empty_like(slack)))
        return follows.mul_(chunk.weights).mul_(chunk.advantages).mul_(change.sign())

    def adjoint(self, sums: Tensor) -> Tensor | None:
        return torch.cat([sums.to(self.dtype), self.node_values])

    def finish(self, chunk: Chunk, values: list[Tensor]) -> Tensor:
        """dB_i/dr_j = -sign(r_j - 1) for every other token i, and dr_j/dx_j = r_j."""
        pushed, slack = values
        change = torch.expm1(chunk.log_ratio)
        others = pushed - self._pushed(chunk, change, slack)
        return chunk.only_counted(others.mul_(chunk.ratio).mul_(change.sign_().neg_()))
