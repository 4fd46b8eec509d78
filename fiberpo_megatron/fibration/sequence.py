"""Define objectives with ungated node sums: GSPO, GMPO, APC-Obj, and its coupling over a trajectory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fiberpo_megatron.fibration.budgets import check_budget
from fiberpo_megatron.fibration.exact import COUNT, Range
from fiberpo_megatron.fibration.levels import STATE_KEY, TRAJECTORY_KEY
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.objective import Objective
from fiberpo_megatron.fibration.options import Advice, Epsilon, epsilon_advice, epsilon_pair, pair
from fiberpo_megatron.fibration.ratio_clip import RatioClip, pessimistic_clip
from fiberpo_megatron.fibration.registry import register
from fiberpo_megatron.fibration.rule import Chunk, Clip, GatedChunk, Gating, equal
from fiberpo_megatron.fibration.tokens import WIDEST_LOG_RATIO


@register("gspo")
@dataclass(frozen=True)
class GSPO(RatioClip):
    """Clips one length-normalised ratio per trajectory pessimistically (GSPO, arXiv:2507.18071, equations 5 and 7).

    The gradient is GSPO-token's (equations 13 and 14): the ratio s carries none itself, and c_j = mu_j A_j s unless the
    clip holds s for the sign of A_j. Where all tokens of a trajectory have the same advantage and weight, that is the
    derivative of GSPO's value. Where they have their own, only GSPO-token gives each token its own advantage.
    """

    epsilon: float | Sequence[float] | Mapping[str, float] = (4e-4, 3e-4)  # section 5.1
    """Width of the clip of the ratio: one number, or {low = ..., high = ...}; a pair is (high, low). The lower one must
    be below 1."""

    paper = "arXiv:2507.18071"
    advantage, normalise_std = "group-mean", True
    gradient_is_derivative = False
    kernel = "fiberpo_megatron.fibration.kernels.formulas:GSPO"
    base_keys = (TRAJECTORY_KEY,)
    node_terms = 2
    max_log_ratio = WIDEST_LOG_RATIO

    @property
    def term_ranges(self) -> tuple[Range, ...]:
        """Return the ranges of 1 and x."""
        return COUNT, Range.covering(self.max_log_ratio)

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Return 1 and x, whose sums give the mean log ratio."""
        return chunk.counted, chunk.only_counted(chunk.log_ratio.clone())

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        """Return the gating that holds each trajectory's ratio."""
        assert sums is not None
        return _GSPOGating(self.bounds, sums, like)


class _MeanRatio(Gating):
    """Gives each token the exponential of its node's mean: `sums` are the number of tokens, and what is averaged."""

    def __init__(self, epsilon: Epsilon, sums: Tensor, like: Tensor) -> None:
        self.epsilon = epsilon
        self.node_values = (sums[1] / sums[0].clamp(min=1.0)).exp().unsqueeze(0).to(like.dtype)


class _GSPOGating(_MeanRatio):
    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        ratio = pessimistic_clip(values[0], chunk.advantages, self.epsilon)
        free = equal(ratio, values[0])
        return GatedChunk(ratio, (chunk.scale * ratio).mul_(free), free)

    def clip(self, chunk: Chunk, values: list[Tensor]) -> Clip:
        high, low = self.epsilon
        return _one_sided("ratio of the trajectory", values[0], chunk, 1.0 - low, 1.0 + high)


@register("gmpo")
@dataclass(frozen=True)
class GMPO(Objective):
    """Takes the geometric mean of a trajectory's ratios, each clipped pessimistically first (GMPO, arXiv:2507.20673).

    G = exp(mean of x'), with x' = min(x, e_high) for A >= 0 and max(x, -e_low) for A < 0, and c_j = mu_j A_j G unless
    the clip holds x_j. As for `gspo`, that is the derivative where all tokens of a trajectory have the same advantage
    and weight, and gives each token its own advantage where they have not.
    """

    epsilon: float | Sequence[float] | Mapping[str, float] = 0.4
    """Width of the clip of each token's log ratio: one number, or {low = ..., high = ...}; a pair is (high, low). The
    paper recommends 0.4, which lets ratios move from exp(-0.4) to exp(0.4)."""

    paper = "arXiv:2507.20673"
    advantage, normalise_std = "group-mean", True
    gradient_is_derivative = False
    base_keys = (TRAJECTORY_KEY,)
    node_terms = 2

    @cached_property
    def bounds(self) -> Epsilon:
        """Return the (upper, lower) width of the clip."""
        return epsilon_pair(self.epsilon)

    def check(self) -> None:
        """Refuse widths that are not positive."""
        _ = self.bounds

    def advice(self, given: Mapping[str, Any]) -> list[Advice]:
        """Return the advice to name the widths of a bare pair."""
        return epsilon_advice(given, type(self).epsilon)

    @property
    def term_ranges(self) -> tuple[Range, ...]:
        """Return the ranges of 1 and x'."""
        return COUNT, Range.covering(self.max_log_ratio)

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Return 1 and x', whose sums give the mean clipped log ratio."""
        return chunk.counted, chunk.only_counted(_clipped(chunk, self.bounds))

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        """Return the gating that holds each trajectory's geometric mean."""
        assert sums is not None
        return _GMPOGating(self.bounds, sums, like)


class _GMPOGating(_MeanRatio):
    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        free = equal(_clipped(chunk, self.epsilon), chunk.log_ratio)
        return GatedChunk(values[0], (chunk.scale * values[0]).mul_(free), free)

    def clip(self, chunk: Chunk, values: list[Tensor]) -> Clip:
        high, low = self.epsilon
        return _one_sided("log ratio", chunk.log_ratio, chunk, -low, high)


def _one_sided(name: str, value: Tensor, chunk: Chunk, low: float, high: float) -> Clip:
    """The bounds of a pessimistic clip: from above for A >= 0, from below for A < 0."""
    gain = chunk.advantages >= 0
    ends = torch.full_like(value, -math.inf), torch.full_like(value, math.inf)
    return Clip.of(name, value, ends[0].masked_fill(~gain, low), ends[1].masked_fill(gain, high))


def _clipped(chunk: Chunk, epsilon: Epsilon) -> Tensor:
    """The pessimistic clip of each log ratio: from above for A >= 0, from below for A < 0."""
    gain = torch.ge(chunk.advantages, 0.0, out=torch.empty_like(chunk.advantages))
    below = chunk.log_ratio.clamp(min=-epsilon[1]).mul_(1.0 - gain)
    return chunk.log_ratio.clamp(max=epsilon[0]).mul_(gain).add_(below)


@dataclass(frozen=True)
class _BoundedSum(Objective):
    """Bounds the sum of |r - 1| over the tokens of each node: what `APC` and `APCTrajectory` share."""

    budgets: Mapping[str, Sequence[float]] | None = None
    """The pair (C+, C-) of the objective's one level, whose sum is delta. Unset: (0.12, 0.10)."""

    level: ClassVar[str]
    """Key that names the nodes."""
    node_terms = 2
    adjoint_terms = 1

    @cached_property
    def delta(self) -> float:
        """Return the mean |r - 1| that a node may reach before it is censored."""
        given = {self.level: (0.12, 0.10)} if self.budgets is None else self.budgets
        if set(given) != {self.level}:
            raise ValueError(f"objective {self.name!r} reads exactly budgets[{self.level!r}]; got {sorted(given)}")
        return sum(check_budget(self.level, pair(f"budgets[{self.level!r}]", given[self.level])))

    def check(self) -> None:
        """Refuse budgets that are not a pair of positive numbers for the objective's level."""
        _ = self.delta

    @property
    def term_ranges(self) -> tuple[Range, ...]:
        """Return the ranges of 1 and |r - 1|."""
        return COUNT, Range.covering(math.exp(self.max_log_ratio))

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Return 1 and |r - 1|, whose sums give the slack."""
        return chunk.counted, chunk.only_counted(torch.expm1(chunk.log_ratio).abs_())

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        """Return the gating that holds each node's slack."""
        assert sums is not None
        slack = (sums[0] * self.delta - sums[1]).unsqueeze(0)
        return _APCGating(slack, self.delta if self.lone_nodes else None, like)


@register("apc")
@dataclass(frozen=True)
class APC(_BoundedSum):
    """Bounds how far the policy moves in each state: APC-Obj (arXiv:2603.08239, definition 3.2).

    G_i = 1 + clip(r_i - 1, -B_i, B_i) with B_i = max(0, T_s delta - sum of |r_j - 1| over the other samples of the same
    state). The samples of a state s are the T_s tokens of the mini-batch that were drawn after the same prompt and the
    same tokens; with free ratios the maximum is the sample-based update of TV-TRPO (theorem 3.3). A state that was
    sampled once has the id -1, and B = delta. The paper's mu is 1/T over all T tokens.
    """

    paper = "arXiv:2603.08239"
    level = STATE_KEY
    base_keys = (STATE_KEY,)
    lone_nodes = True
    weighting = "token-mean"
    kernel = "fiberpo_megatron.fibration.kernels.formulas:APC"


@register("apc-trajectory")
@dataclass(frozen=True)
class APCTrajectory(_BoundedSum):
    """Bounds how far a trajectory's ratios move in sum: a step of the derivation of FiberPO (arXiv:2603.08239, E.5.3).

    G_i = 1 + clip(r_i - 1, -B_i, B_i) with B_i = max(0, T delta - sum of the others' |r_j - 1|); T counts the
    trajectory's tokens. With slack = T delta - sum of all |r_j - 1|, G = r while slack >= 0 and
    |G_i - 1| = max(0, |r_i - 1| + slack) beyond.
    """

    level = TRAJECTORY_KEY
    base_keys = (TRAJECTORY_KEY,)
    kernel = APC.kernel


class _APCGating(Gating):
    def __init__(self, slack: Tensor, lone_bound: float | None, like: Tensor) -> None:
        self.dtype = like.dtype
        self.lone_bound = lone_bound
        self.node_values: Tensor = slack.to(like.dtype)
        self.any_beyond = bool((self.node_values < 0.0).any())  # else every bound is free, and q is zero for all tokens

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        change, (slack,) = torch.expm1(chunk.log_ratio), values
        size = change.abs()
        free = torch.ge(slack, 0.0, out=torch.empty_like(slack))
        reach = (size + slack).clamp_(min=0.0)
        if self.lone_bound is not None:  # the slack of lone tokens' node is not a number (`Rule.lone_nodes`)
            lone = slack.isnan()
            bound = size.clamp(max=self.lone_bound)
            free, reach = torch.where(lone, equal(bound, size), free), torch.where(lone, bound, reach)
        free_ratio = chunk.ratio * free
        ratio = (1.0 - free).mul_(reach.mul_(change.sign()).add_(1.0)).add_(free_ratio)
        gradient = free_ratio.mul_(chunk.weights).mul_(chunk.advantages)
        return GatedChunk(ratio, gradient, free, (self._pushed(chunk, change, slack),) if self.any_beyond else ())

    def clip(self, chunk: Chunk, values: list[Tensor]) -> Clip:
        """Return what |r - 1| may be for each token: the slack of its node and its own part of what used it up."""
        size, (slack,) = torch.expm1(chunk.log_ratio).abs(), values
        reach = (size + slack).clamp(min=0.0)
        if self.lone_bound is not None:
            reach = reach.masked_fill(slack.isnan(), self.lone_bound)
        return Clip.of("change |ratio - 1|", size, -math.inf, reach)

    def _pushed(self, chunk: Chunk, change: Tensor, slack: Tensor) -> Tensor:
        """q_i = mu A sign(r_i - 1) where the bound B_i > 0 is what G_i follows.

        A lone token's bound does not depend on any ratio, and neither comparison holds for its slack.
        """
        follows = torch.gt(change.abs() + slack, 0.0, out=torch.empty_like(slack))
        follows.mul_(torch.lt(slack, 0.0, out=torch.empty_like(slack)))
        return follows.mul_(chunk.weights).mul_(chunk.advantages).mul_(change.sign())

    def adjoint(self, sums: Tensor) -> Tensor | None:
        return torch.cat([sums.to(self.dtype), self.node_values]) if self.any_beyond else None

    def finish(self, chunk: Chunk, values: list[Tensor]) -> Tensor:
        """dB_i/dr_j = -sign(r_j - 1) for every other token i, and dr_j/dx_j = r_j."""
        pushed, slack = values
        change = torch.expm1(chunk.log_ratio)
        others = pushed - self._pushed(chunk, change, slack)
        return chunk.only_counted(others.mul_(chunk.ratio).mul_(change.sign_().neg_()))
