"""Define the pessimistic clip of a ratio, and the options of every objective that clips a ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fiberpo_megatron.fibration.objective import Objective
from fiberpo_megatron.fibration.options import Advice, Epsilon, epsilon_advice, epsilon_pair


@dataclass(frozen=True)
class RatioClip(Objective):
    """Adds the two bounds of a clipped ratio to an objective: 1 - lower and 1 + upper."""

    epsilon: float | Sequence[float] | Mapping[str, float] = 0.2
    """Width of the clip of the ratio: one number, or {low = ..., high = ...}; a pair is (high, low). The lower one must
    be below 1."""
    epsilon_high: float | None = None
    """Upper width alone; `epsilon`, then one number, is the lower width. Unset: `epsilon` gives both."""

    may_lack_lower_bound: ClassVar[bool] = False
    """Whether a lower width of 1, which lets the ratio fall to 0, is allowed."""

    @cached_property
    def bounds(self) -> Epsilon:
        """Return the (upper, lower) width of the clip."""
        given, default = self.epsilon, type(self).epsilon
        if self.epsilon_high is None:
            high, low = epsilon_pair(given)
        elif isinstance(given, int | float) or given == default:
            high, low = epsilon_pair((self.epsilon_high, epsilon_pair(given)[1]))  # a default gives the lower width
        else:
            raise ValueError(f"epsilon is {given!r} and epsilon_high is also given; pass one of the two")
        if low > 1.0 or (low == 1.0 and not self.may_lack_lower_bound):
            raise ValueError(f"epsilon's lower bound is {low}; 1 - epsilon must stay a positive ratio")
        return high, low

    def check(self) -> None:
        """Refuse bounds that are not positive or that leave no ratio."""
        _ = self.bounds

    def advice(self, given: Mapping[str, Any]) -> list[Advice]:
        """Return the advice to name the widths of a bare pair."""
        return epsilon_advice(given, type(self).epsilon)


def check_dual_clip(dual_clip: float | None) -> None:
    """Raise ValueError unless the bound is unset or above 1."""
    if dual_clip is not None and not 1.0 < dual_clip < float("inf"):
        raise ValueError(f"dual_clip is {dual_clip}; it bounds the ratio of bad tokens and must be above 1")


def pessimistic_clip(ratio: Tensor, advantages: Tensor, epsilon: Epsilon, dual_clip: float | None = None) -> Tensor:
    """Return the G of min(r A, clip(r, 1 - e_low, 1 + e_high) A) = G A (PPO, arXiv:1707.06347, equation 7).

    With A >= 0 only the upper bound can bind, with A < 0 only the lower one; `dual_clip` c bounds the
    latter by max(., c A) (arXiv:1912.09729, equation 5). All tensors are [n].
    """
    upper, lower = 1.0 + epsilon[0], 1.0 - epsilon[1]
    gain = torch.ge(advantages, 0.0, out=torch.empty_like(advantages))
    loss = 1.0 - gain
    below = ratio.clamp(min=lower, max=dual_clip)
    return ratio.clamp(max=upper).mul_(gain).add_(below.mul_(loss))
