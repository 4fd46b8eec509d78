import numpy as np
import pytest

from fiberpo_megatron.trainer.advantages import group_advantages

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
