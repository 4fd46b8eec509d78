"""Group-relative advantages."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Baseline = Literal["group-mean", "leave-one-out", "none"]


def group_advantages(
    rewards: NDArray[np.float32], groups: NDArray[np.int64], baseline: Baseline, normalise_std: bool
) -> NDArray[np.float32]:
    """[B] advantages from [B] rewards and [B] dense group ids.

    group-mean: r - mean of its group (GRPO, arXiv:2402.03300 section 4.1); leave-one-out: r - mean of the others
    (RLOO, arXiv:2402.14740 equation 4); none: r. `normalise_std` divides by the group's sample standard deviation
    + 1e-6 (GRPO; arXiv:2503.20783 argues for leaving it out). A group of equal rewards gets exactly 0 from either
    baseline. Raises ValueError for a group of one with a baseline or normalisation: it has nothing to compare.
    """
    if not len(rewards):
        return np.zeros(0, np.float32)
    values = rewards.astype(np.float64)
    sizes = np.bincount(groups)
    if (baseline != "none" or normalise_std) and (sizes == 1).any():
        raise ValueError(
            f"group {int(np.flatnonzero(sizes == 1)[0])} has one trajectory: nothing to compare with; raise "
            'batch.samples_per_prompt to 2 or more, or set algorithm.advantage = "none" and normalise_std = false'
        )
    with np.errstate(invalid="ignore"):
        means = np.bincount(groups, values) / sizes
        deviations = values - means[groups]
        variances = np.bincount(groups, deviations**2) / np.maximum(sizes - 1, 1)
    advantages = values if baseline == "none" else deviations
    if baseline == "leave-one-out":
        advantages = deviations * (sizes / np.maximum(sizes - 1, 1))[groups]
    if normalise_std:
        advantages = advantages / (np.sqrt(variances) + 1e-6)[groups]
    equal = np.ones(len(sizes), bool)
    first = np.full(len(sizes), np.nan)
    first[groups[::-1]] = values[::-1]
    np.logical_and.at(equal, groups, values == first[groups])
    if baseline != "none":
        advantages = np.where(equal[groups], 0.0, advantages)  # the mean of equal numbers can differ in the last bit
    return advantages.astype(np.float32)
