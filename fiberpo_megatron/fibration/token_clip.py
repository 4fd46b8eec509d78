"""Define objectives without node sums that clip a token's ratio, or take it as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fiberpo_megatron.fibration.objective import TokenObjective
from fiberpo_megatron.fibration.ratio_clip import RatioClip, check_dual_clip, pessimistic_clip
from fiberpo_megatron.fibration.registry import register
from fiberpo_megatron.fibration.rule import Chunk, Clip, GatedChunk, equal
from fiberpo_megatron.fibration.tokens import WIDEST_LOG_RATIO


@register("ppo")
@dataclass(frozen=True)
class PPO(RatioClip, TokenObjective):
    """Clips the ratio of each token pessimistically (PPO, arXiv:1707.06347, equation 7; epsilon from section 6.1)."""

    dual_clip: float | None = None
    """Bound c > 1: tokens with A < 0 and x > 0 use max(r A, c A) (arXiv:1912.09729, equation 5). Unset: no bound."""

    kernel = "fiberpo_megatron.fibration.kernels.formulas:PPO"

    def check(self) -> None:
        """Refuse bounds that are not positive, and a dual clip that is not above 1."""
        super().check()
        check_dual_clip(self.dual_clip)

    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return the clipped ratio, and a gradient of zero where the clip holds it."""
        ratio = pessimistic_clip(chunk.ratio, chunk.advantages, self.bounds, self.dual_clip)
        free = equal(ratio, chunk.ratio)
        return GatedChunk(ratio, (chunk.scale * ratio).mul_(free), free)

    def clip(self, chunk: Chunk) -> Clip:
        """Return the bound of the ratio that can bind for the sign of the advantage."""
        high, low = self.bounds
        gain = chunk.advantages >= 0
        upper = math.inf if self.dual_clip is None else self.dual_clip
        ends = torch.full_like(chunk.ratio, -math.inf), torch.full_like(chunk.ratio, upper)
        return Clip.of(
            "ratio", chunk.ratio, ends[0].masked_fill(~gain, 1.0 - low), ends[1].masked_fill(gain, 1.0 + high)
        )


@register("grpo")
@dataclass(frozen=True)
class GRPO(PPO):
    """Is PPO's clip under another name (arXiv:2402.03300, equation 3): the group baseline is an advantage estimator."""

    paper = "arXiv:2402.03300"
    advantage, normalise_std = "group-mean", True
    kernel = PPO.kernel


@register("drgrpo")
@dataclass(frozen=True)
class DrGRPO(PPO):
    """Is GRPO without its two biases (Dr.GRPO, arXiv:2503.20783, section 3.2): the sum over a response's tokens is
    divided by a constant, not by its length, and the advantage is not divided by the group's standard deviation."""

    paper = "arXiv:2503.20783"
    weighting = "constant"
    advantage, normalise_std = "group-mean", False
    kernel = PPO.kernel


@register("reinforce++")
@dataclass(frozen=True)
class ReinforcePlusPlus(PPO):
    """Is PPO's clip with advantages that are standardised over the whole batch (REINFORCE++, arXiv:2501.03262)."""

    paper = "arXiv:2501.03262"
    advantage = "reinforce++"
    kernel = PPO.kernel


@register("dapo")
@dataclass(frozen=True)
class DAPO(PPO):
    """Is PPO's clip with a higher upper bound (clip-higher, arXiv:2503.14476, equation 10 and section 4.1)."""

    epsilon: float | Sequence[float] | Mapping[str, float] = (0.28, 0.2)
    """Width of the clip of the ratio: one number, or {low = ..., high = ...}; a pair is (high, low). The lower one must
    be below 1."""

    paper = "arXiv:2503.14476"
    weighting = "token-mean"
    advantage, normalise_std = "group-mean", True
    kernel = PPO.kernel


@register("cispo")
@dataclass(frozen=True)
class CISPO(RatioClip, TokenObjective):
    """Multiplies the log-prob by a clipped ratio that carries no gradient (arXiv:2506.13585, equations 4 and 5).

    The gradient is mu A clip(r, 1 - e_low, 1 + e_high) for every token. The value is sum mu A clip(r):
    because of the stop-gradient, the gradient is not the value's derivative.
    """

    epsilon: float | Sequence[float] | Mapping[str, float] = (4.0, 1.0)
    """Width of the clip of the ratio: one number, or {low = ..., high = ...}; a pair is (high, low). A lower one of 1
    sets no lower bound, as in section 3 of the paper; the upper bound of 5 is our choice."""

    paper = "arXiv:2506.13585"
    weighting = "token-mean"
    advantage, normalise_std = "group-mean", True
    gradient_is_derivative = False
    may_lack_lower_bound = True
    max_log_ratio = WIDEST_LOG_RATIO
    kernel = "fiberpo_megatron.fibration.kernels.formulas:CISPO"

    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return the clipped ratio, and mu A times it as the gradient."""
        high, low = self.bounds
        ratio = chunk.ratio.clamp(1.0 - low, 1.0 + high)
        free = equal(ratio, chunk.ratio)
        return GatedChunk(ratio, chunk.scale * ratio, free)

    def clip(self, chunk: Chunk) -> Clip:
        """Return both bounds of the ratio."""
        high, low = self.bounds
        return Clip.of("ratio", chunk.ratio, 1.0 - low, 1.0 + high)


@register("reinforce")
@dataclass(frozen=True)
class Reinforce(TokenObjective):
    """Multiplies each token by its plain importance ratio: G = r."""

    kernel = "fiberpo_megatron.fibration.kernels.formulas:REINFORCE"

    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return the ratio, and mu A r as the gradient."""
        ratio = chunk.ratio
        return GatedChunk(ratio, chunk.scale * ratio)


@register("rloo")
@dataclass(frozen=True)
class RLOO(Reinforce):
    """Takes each token's plain importance ratio, the other samples' mean reward as the baseline, and the sum over a
    response's tokens (RLOO, arXiv:2402.14740, equation 4). On-policy that is the paper's estimator."""

    paper = "arXiv:2402.14740"
    weighting = "seq-sum"
    advantage, normalise_std = "rloo", False
    kernel = Reinforce.kernel
