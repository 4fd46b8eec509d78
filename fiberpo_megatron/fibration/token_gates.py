"""Define objectives without node sums whose gate is no clip of the ratio: SAPO's sigmoid and DPPO's mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fiberpo_megatron.fibration.objective import TokenObjective
from fiberpo_megatron.fibration.options import Advice, Epsilon, epsilon_advice, epsilon_pair
from fiberpo_megatron.fibration.registry import register
from fiberpo_megatron.fibration.rule import Chunk, Clip, GatedChunk


@register("sapo")
@dataclass(frozen=True)
class SAPO(TokenObjective):
    """Replaces the clip of the ratio by a sigmoid that attenuates gradually (SAPO, arXiv:2511.20347).

    The paper's gate is f(r) = (4 / tau) sigmoid(tau (r - 1)). Here G = f(r) - 2 / tau + 1, so that G is 1 on-policy, as
    for every other objective: the constant changes the value of J and no gradient.
    """

    tau_positive: float = 1.0
    """Temperature of tokens with a positive advantage; a higher one attenuates sooner."""
    tau_negative: float = 1.05
    """Temperature of all other tokens."""

    paper = "arXiv:2511.20347"
    advantage, normalise_std = "group-mean", True
    kernel = "fiberpo_megatron.fibration.kernels.formulas:SAPO"

    def check(self) -> None:
        """Refuse temperatures that are not positive."""
        for name in ("tau_positive", "tau_negative"):
            if getattr(self, name) <= 0:
                raise ValueError(f"objective {self.name!r}: {name} is {getattr(self, name)}; choose a positive number")

    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return the gate and its derivative, mu A 4 sigmoid (1 - sigmoid) r."""
        tau = torch.full_like(chunk.ratio, self.tau_negative).masked_fill_(chunk.advantages > 0, self.tau_positive)
        passed = 0.5 * (1 + torch.tanh(0.5 * tau * (chunk.ratio - 1)))  # the sigmoid, whose own operation on a CPU
        gated = 1 + 4 / tau * (passed - 0.5)  # gives a token other bits where it stands at another place
        slope = 4 * passed * (1 - passed)  # dG/dr; and dr/dx = r
        return GatedChunk(gated, chunk.scale * slope * chunk.ratio)


@register("dppo")
@dataclass(frozen=True)
class DPPO(TokenObjective):
    """Leaves out tokens whose probability moved too far in the direction of their advantage (DPPO with the binary total
    variation, arXiv:2602.04879).

    G = M r, where M is 0 for a token with A > 0 and pi - pi_old > e_high, or A <= 0 and pi - pi_old < -e_low, and 1 for
    all others. |pi - pi_old| is the total variation between the two policies that are each reduced to "this token or
    another one". pi_old is the policy before the first optimiser step, as for every other objective here.
    """

    epsilon: float | Sequence[float] | Mapping[str, float] = 0.15
    """How far a token's probability may move: one number, or {high = up, for positive advantages, low = down, for all
    others}; a pair is (high, low)."""
    truncation: float | None = None
    """Bound on the ratio, at least 1, which carries no gradient of its own: c = mu A M min(r, truncation). Unset: no
    bound."""

    paper = "arXiv:2602.04879"
    weighting = "constant"
    advantage, normalise_std = "group-mean", False
    reads_old_log_probs = True

    @cached_property
    def bounds(self) -> Epsilon:
        """Return the (upper, lower) threshold of pi - pi_old."""
        return epsilon_pair(self.epsilon)

    def check(self) -> None:
        """Refuse thresholds that are not positive, and a truncation below 1."""
        _ = self.bounds
        if self.truncation is not None and self.truncation < 1.0:
            raise ValueError(
                f"objective {self.name!r}: truncation is {self.truncation}; it bounds the ratio from above and must be "
                "at least 1"
            )

    def advice(self, given: Mapping[str, Any]) -> list[Advice]:
        """Return the advice to name the thresholds of a bare pair."""
        return epsilon_advice(given, type(self).epsilon)

    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return the ratio, or 0 for a token that the mask leaves out, and mu A times it as the gradient."""
        assert chunk.old_log_probs is not None
        high, low = self.bounds
        moved = chunk.old_log_probs.exp().mul_(torch.expm1(chunk.log_ratio))  # pi - pi_old
        out = torch.where(chunk.advantages > 0, moved > high, moved < -low)
        free = torch.ones_like(moved).masked_fill_(out, 0.0)
        ratio = chunk.ratio.clamp(max=self.truncation) if self.truncation is not None else chunk.ratio
        gated = ratio * free
        return GatedChunk(gated, chunk.scale * gated, free)

    def clip(self, chunk: Chunk) -> Clip:
        """Return the bound of pi - pi_old on the side of the advantage."""
        assert chunk.old_log_probs is not None
        high, low = self.bounds
        moved = chunk.old_log_probs.exp().mul_(torch.expm1(chunk.log_ratio))
        gain = chunk.advantages > 0
        ends = torch.full_like(moved, -math.inf), torch.full_like(moved, math.inf)
        return Clip.of("probability change", moved, ends[0].masked_fill(~gain, -low), ends[1].masked_fill(gain, high))
