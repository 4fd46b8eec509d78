"""Objectives without aggregates: PPO, GRPO, DAPO, CISPO and plain importance weighting."""

from __future__ import annotations

from torch import Tensor

from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.rule import Chunk, Epsilon, GatedChunk, Gating, Rule, equal, pessimistic_clip


class _TokenRule(Rule, Gating):
    """A rule that needs no node: it is its own gating."""

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        return self


class PPORule(_TokenRule):
    """Pessimistic token clip: PPO (arXiv:1707.06347, equation 7), GRPO (arXiv:2402.03300, equation 3) and
    DAPO's clip-higher (arXiv:2503.14476, equation 10); they differ in epsilon and in the caller's weights."""

    def __init__(self, epsilon: Epsilon, dual_clip: float | None) -> None:
        self.epsilon = epsilon
        self.dual_clip = dual_clip

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        ratio = pessimistic_clip(chunk.ratio, chunk.advantages, self.epsilon, self.dual_clip)
        free = equal(ratio, chunk.ratio)
        return GatedChunk(ratio, (chunk.weights * chunk.advantages).mul_(ratio).mul_(free), free)


class CISPORule(_TokenRule):
    """Clipped weight without gradient times log-prob (arXiv:2506.13585, equations 4 and 5).

    The gradient is mu A clip(r, 1 - e_low, 1 + e_high) for every token. The value is sum mu A clip(r):
    because of the stop-gradient, the gradient is not the value's derivative.
    """

    def __init__(self, epsilon: Epsilon) -> None:
        self.epsilon = epsilon

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        ratio = chunk.ratio.clamp(1.0 - self.epsilon[1], 1.0 + self.epsilon[0])
        free = equal(ratio, chunk.ratio)
        return GatedChunk(ratio, (chunk.weights * chunk.advantages).mul_(ratio), free)


class ReinforceRule(_TokenRule):
    """Plain importance weighting: G = r."""

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        ratio = chunk.ratio
        return GatedChunk(ratio, (chunk.weights * chunk.advantages).mul_(ratio), ratio.new_ones(ratio.shape))
