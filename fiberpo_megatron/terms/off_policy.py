"""Leave out trajectories that have left the policy: off-policy sequence masking of DeepSeek-V3.2.

arXiv:2512.02556, section 3.1, equations 8 and 9: a token's policy loss (not its KL penalty) is multiplied by

    M_{i,t} = 0 if A_{i,t} < 0 and 1/|o_i| sum_t log(pi_old(o_{i,t}) / pi_theta(o_{i,t})) > delta, else 1

where pi_old are the probabilities that the sampling engine returned, so that the mean holds both what the optimiser has
moved since and what trainer and engine differ in.
"""

import torch
from torch import Tensor

RESOLUTION = 2.0**-24
"""Differences are rounded to a multiple of it, in nats. Sums of such numbers are exact in float64 up to 5e8 nats, and
so do not depend on the order of tokens or on how ranks share a trajectory."""


def drift_sums(rollout: Tensor, current: Tensor, trajectory: Tensor, count: int) -> Tensor:
    """Return float64 [2, count]: per trajectory the sum of log pi_rollout - log pi over its tokens, and their number.

    `rollout` and `current` are log-probs [n], `trajectory` the ids [n] of the tokens' trajectories. What ranks that
    share a trajectory return is added up.
    """
    difference = (rollout.double() - current.double()).div(RESOLUTION).round().mul(RESOLUTION)
    sums = torch.zeros(2, count, dtype=torch.float64, device=current.device)
    sums[0].index_add_(0, trajectory.long(), difference)
    sums[1].index_add_(0, trajectory.long(), torch.ones_like(difference))
    return sums


def off_policy_factor(sums: Tensor, trajectory: Tensor, advantages: Tensor, delta: float) -> Tensor:
    """Return M, float64 [n], of zeros and ones, from the complete `drift_sums`."""
    far = sums[0] / sums[1].clamp(min=1.0) > delta
    return (~(far[trajectory.long()] & (advantages < 0))).double()
