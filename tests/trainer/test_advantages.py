import numpy as np
import pytest

from fiberpo_megatron.plugins import BUILT_IN, find
from fiberpo_megatron.trainer.advantages import (
    RLOO,
    BatchStandardised,
    GroupMean,
    LeaveOneOut,
    NoBaseline,
    estimate,
    group_advantages,
)
from fiberpo_megatron.types import RolloutBatch

REWARDS = np.array([1, 0, 0, 0, 1, 1], np.float32)
GROUPS = np.array([0, 0, 0, 0, 1, 1])


def test_group_mean_and_leave_one_out_by_hand():
    mean = group_advantages(REWARDS, GROUPS, "group-mean", False)
    np.testing.assert_allclose(mean, [0.75, -0.25, -0.25, -0.25, 0, 0])
    leave = group_advantages(REWARDS, GROUPS, "leave-one-out", False)
    np.testing.assert_allclose(leave, [1, -1 / 3, -1 / 3, -1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(group_advantages(REWARDS, GROUPS, "none", False), REWARDS)


def test_std_normalisation_by_hand():
    normal = group_advantages(REWARDS, GROUPS, "group-mean", True)
    np.testing.assert_allclose(normal[:4], np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6), rtol=1e-6)


@pytest.mark.parametrize("baseline", ["group-mean", "leave-one-out"])
def test_equal_rewards_give_exactly_zero(baseline):
    rewards = np.full(7, 0.1, np.float32)
    assert not group_advantages(rewards, np.zeros(7, np.int64), baseline, True).any()


def test_group_of_one_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="group 1 has one trajectory.*samples_per_prompt"):
        group_advantages(np.ones(3, np.float32), np.array([0, 0, 1]), "group-mean", False)
    assert group_advantages(np.ones(1, np.float32), np.array([0]), "none", False).tolist() == [1.0]


# ---- estimators ----


def rollouts(rewards=REWARDS, groups=GROUPS, lengths=None) -> RolloutBatch:
    lengths = np.full(len(rewards), 2) if lengths is None else np.asarray(lengths)
    tokens = int(lengths.sum())
    return RolloutBatch.filled(
        tokens=np.zeros(tokens), response_mask=np.ones(tokens), lengths=lengths, rewards=rewards, groups=groups
    )


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("name", ["group-mean", "leave-one-out", "none"])
def test_the_built_in_estimators_are_the_function(name, normalise_std):
    estimator = find("advantages", name, "algorithm.advantage").target(normalise_std=normalise_std)
    rewards = np.random.default_rng(0).normal(size=40).astype(np.float32)
    groups = np.repeat(np.arange(10), 4)
    expected = group_advantages(rewards, groups, name, normalise_std)
    np.testing.assert_array_equal(estimate(estimator, rollouts(rewards, groups)), expected)


def test_rloo_is_leave_one_out_without_a_division():
    rewards = np.random.default_rng(0).normal(size=40).astype(np.float32)
    batch = rollouts(rewards, np.repeat(np.arange(10), 4))
    np.testing.assert_array_equal(RLOO()(batch), LeaveOneOut(normalise_std=False)(batch))
    assert set(BUILT_IN["advantages"]) == {"group-mean", "leave-one-out", "none", "rloo", "reinforce++"}


def test_reinforce_plus_plus_standardises_over_the_tokens_of_the_step():
    lengths = np.array([1, 3, 2, 5, 1, 4])
    found = BatchStandardised()(rollouts(REWARDS, GROUPS, lengths))
    tokens = np.repeat(REWARDS.astype(np.float64), lengths)
    np.testing.assert_allclose(found, (REWARDS - tokens.mean()) / tokens.std(ddof=1), rtol=1e-6)
    spread = np.repeat(found, lengths)
    np.testing.assert_allclose([spread.mean(), spread.std(ddof=1)], [0, 1], atol=1e-6)
    above = BatchStandardised(baseline="group-mean")(rollouts(REWARDS, GROUPS, lengths))
    tokens = np.repeat(REWARDS - np.array([0.25] * 4 + [1.0] * 2), lengths)
    np.testing.assert_allclose(np.repeat(above, lengths), (tokens - tokens.mean()) / tokens.std(ddof=1), rtol=1e-6)


def test_reinforce_plus_plus_of_equal_rewards_is_zero():
    equal = rollouts(np.full(6, 0.1, np.float32), GROUPS, [1, 3, 2, 5, 1, 4])
    assert not BatchStandardised()(equal).any() and not BatchStandardised(baseline="group-mean")(equal).any()
    assert [BatchStandardised().least_samples, BatchStandardised(baseline="group-mean").least_samples] == [1, 2]
    with pytest.raises(ValueError, match="baseline is 'mean'; choose"):
        BatchStandardised(baseline="mean")


@pytest.mark.parametrize("estimator", [GroupMean(), GroupMean(False), LeaveOneOut(False), NoBaseline(True)], ids=str)
def test_a_trajectory_whose_group_was_dropped_gets_zero(estimator):
    """The other groups are as they would be without it, also where a whole group is gone."""
    rewards, groups = np.array([1, 0, 7, 1, 1, 0], np.float32), np.array([0, 0, 1, 3, 3, 3])
    found = estimator(rollouts(rewards, groups))
    others = groups != 1
    assert found[2] == 0.0 and found.dtype == np.float32
    np.testing.assert_array_equal(found[others], estimator(rollouts(rewards[others], np.array([0, 0, 1, 1, 1]))))
    assert found[others].any()


def test_how_many_samples_an_estimator_compares():
    assert [GroupMean(False).least_samples, LeaveOneOut(False).least_samples, NoBaseline(True).least_samples] == [2] * 3
    assert NoBaseline(False).least_samples == 1
    np.testing.assert_array_equal(NoBaseline(False)(rollouts(np.ones(1, np.float32), np.array([0]))), [1.0])


@pytest.mark.parametrize("estimator", [GroupMean(), LeaveOneOut(), NoBaseline(), BatchStandardised()], ids=str)
def test_no_trajectories(estimator):
    empty = rollouts(np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert estimate(estimator, empty).shape == (0,)


class PerToken:
    """An estimator of one's own, which needs more than the rewards."""

    least_samples = 2

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, rollouts):
        mean = group_advantages(rollouts.rewards, rollouts.groups, "group-mean", normalise_std=False)
        return self.scale * mean / rollouts.response_lengths


def test_an_estimator_of_ones_own_sees_the_rollouts():
    batch = rollouts(lengths=[1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(estimate(PerToken(6.0), batch), [4.5, -0.75, -0.5, -0.375, 0, 0])
    assert find("advantages", "tests.trainer.test_advantages:PerToken", "algorithm.advantage").target is PerToken


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (np.zeros(5), r"estimator .*Fixed returned float64 of shape \(5,\) for 6 trajectories"),
        (np.array([0, 0, np.nan, 0, 0, 0]), r"Fixed returned nan for trajectory 2 \(reward 0.0\)"),
        (["a"] * 6, "return one number per trajectory"),
    ],
)
def test_what_an_estimator_returns_is_checked(returned, words):
    class Fixed:
        def __call__(self, rollouts):
            return returned

    with pytest.raises(ValueError, match=words):
        estimate(Fixed(), rollouts())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_named_as_that(value):
    rewards = REWARDS.copy()
    rewards[4] = value
    with pytest.raises(ValueError, match=rf"the reward of trajectory 4 \(prompt group {GROUPS[4]}\) is {value}"):
        estimate(GroupMean(), rollouts(rewards))
