"""Estimate advantages: an estimator says what a trajectory's reward is compared with.

An estimator is any object that turns a step's rollouts into advantages:

    class LengthNormalised:
        least_samples = 2  # the fewest trajectories of a prompt that it can compare

        def __init__(self, scale: float = 1.0) -> None: ...

        def __call__(self, rollouts: RolloutBatch) -> NDArray[np.float32]:  # [B]
            mean = group_advantages(rollouts.rewards, rollouts.groups, "group-mean", normalise_std=False)
            return mean / rollouts.response_lengths

`algorithm.advantage` names it by import path, with the arguments of its constructor as `options`. `rollouts` is equal
on every rank, so that an estimator that is a function of it gives every rank the same advantages. It has one entry [B]
for each trajectory, whose length counts the response tokens of all of its branches: estimators need not know of them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.interfaces import AdvantageEstimator
from fiberpo_megatron.types import RolloutBatch

Baseline = Literal["group-mean", "leave-one-out", "none"]


@dataclass(frozen=True)
class _Baseline:
    """Computes `group_advantages` with one baseline.

    A trajectory that is alone in its group, because the others were dropped, gets advantage 0 from an estimator that
    compares within a group: from every one but `NoBaseline` without normalisation.
    """

    normalise_std: bool = True
    """Whether the advantage is divided by the group's sample standard deviation + 1e-6; arXiv:2503.20783 argues for
    leaving it out."""

    baseline: ClassVar[Baseline]

    @property
    def least_samples(self) -> int:
        """Fewest trajectories per prompt that leave something to compare with."""
        return 2 if self.baseline != "none" or self.normalise_std else 1

    def __call__(self, rollouts: RolloutBatch) -> NDArray[np.float32]:
        """Return the advantage of each trajectory, [B]."""
        if self.least_samples == 1:
            return group_advantages(rollouts.rewards, rollouts.groups, self.baseline, self.normalise_std)
        advantages = np.zeros(len(rollouts.rewards), np.float32)
        compared = np.bincount(rollouts.groups)[rollouts.groups] > 1
        rewards, groups = rollouts.rewards[compared], rollouts.groups[compared]
        advantages[compared] = group_advantages(rewards, groups, self.baseline, self.normalise_std)
        return advantages


@dataclass(frozen=True)
class GroupMean(_Baseline):
    """Subtracts the mean reward of the trajectory's group (GRPO, arXiv:2402.03300, section 4.1)."""

    baseline = "group-mean"


@dataclass(frozen=True)
class LeaveOneOut(_Baseline):
    """Subtracts the mean reward of the other trajectories of the group (RLOO, arXiv:2402.14740, equation 4)."""

    baseline = "leave-one-out"


@dataclass(frozen=True)
class RLOO(LeaveOneOut):
    """Is the leave-one-out baseline as RLOO has it (arXiv:2402.14740, equation 4): without a division."""

    normalise_std: bool = False
    """Whether the advantage is divided by the group's sample standard deviation + 1e-6, which RLOO does not do."""


@dataclass(frozen=True)
class NoBaseline(_Baseline):
    """Takes the reward itself as the advantage."""

    baseline = "none"


@dataclass(frozen=True)
class BatchStandardised:
    """Subtracts the whole step's mean reward and divides by its standard deviation (REINFORCE++, arXiv:2501.03262):
    (r - mean) / sqrt(variance + 1e-8).

    Mean and sample variance are those of the step's response tokens, each of which has its trajectory's reward; that
    lets long responses count more. Trajectories that all have the same reward get 0.
    """

    baseline: Literal["none", "group-mean"] = "none"
    """What is subtracted before. group-mean: the mean reward of the trajectory's group, which is the paper's
    "REINFORCE++ with baseline"; a trajectory that is alone in its group then stands at 0."""

    @property
    def least_samples(self) -> int:
        """Return the fewest trajectories per prompt that leave something to compare with."""
        return 1 if self.baseline == "none" else 2

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown baseline."""
        if self.baseline not in ("none", "group-mean"):
            raise ValueError(f"baseline is {self.baseline!r}; choose 'none' or 'group-mean'")

    def __call__(self, rollouts: RolloutBatch) -> NDArray[np.float32]:
        """Return the advantage of each trajectory, [B]."""
        values = rollouts.rewards.astype(np.float64)
        if self.baseline == "group-mean":
            values = GroupMean(normalise_std=False)(rollouts).astype(np.float64)
        if not len(values) or values.min() == values.max():
            return np.zeros(len(values), np.float32)
        tokens = rollouts.response_lengths.astype(np.float64)
        deviations = values - (tokens * values).sum() / tokens.sum()
        variance = (tokens * deviations**2).sum() / max(tokens.sum() - 1.0, 1.0)
        return (deviations / np.sqrt(variance + 1e-8)).astype(np.float32)


def estimate(estimator: AdvantageEstimator, rollouts: RolloutBatch) -> NDArray[np.float32]:
    """Return an estimator's advantages, one for each sequence [B]: that of its trajectory.

    Raises ValueError, naming the trajectory, for a reward that is not finite, and, naming the estimator, unless it
    returns one finite number for each trajectory.
    """
    sequences, rollouts = rollouts.sequences, rollouts.per_trajectory()
    count, name = len(rollouts.rewards), type(estimator).__qualname__
    if not np.isfinite(rollouts.rewards).all():
        at = int(np.flatnonzero(~np.isfinite(rollouts.rewards))[0])
        raise ValueError(
            f"the reward of trajectory {at} (prompt group {rollouts.groups[at]}) is {rollouts.rewards[at]}; its "
            "environment, or the stored rollouts that are replayed, must give every trajectory a finite number"
        )
    advantages = np.asarray(estimator(rollouts))
    if advantages.shape != (count,) or not np.issubdtype(advantages.dtype, np.number):
        raise ValueError(
            f"the advantage estimator {name} returned {advantages.dtype} of shape {advantages.shape} for {count} "
            f"trajectories; return one number per trajectory, as float32 [{count}]"
        )
    if not np.isfinite(advantages).all():
        at = int(np.flatnonzero(~np.isfinite(advantages))[0])
        raise ValueError(
            f"the advantage estimator {name} returned {advantages[at]} for trajectory {at} (reward "
            f"{rollouts.rewards[at]}); return finite numbers, such as 0 where there is nothing to compare with"
        )
    return np.repeat(advantages.astype(np.float32), sequences)


def group_advantages(
    rewards: NDArray[np.float32], groups: NDArray[np.int64], baseline: Baseline, normalise_std: bool
) -> NDArray[np.float32]:
    """Return [B] advantages from [B] rewards and [B] dense group ids.

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
