"""The off-policy sequence mask against a formula written out, and that no order or cut of the tokens matters."""

import torch

from fiberpo_megatron.terms.off_policy import drift_sums, off_policy_factor

LENGTHS = (3, 5, 1, 4)


def drawn(seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    trajectory = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    rollout, current = -2.0 * torch.rand(2, len(trajectory), generator=random)
    advantages = torch.randn(len(LENGTHS), generator=random)[trajectory]
    return rollout, current, trajectory, advantages


def test_the_mask_is_equation_9():
    states = set()
    for seed in range(20):
        rollout, current, trajectory, advantages = drawn(seed)
        factor = off_policy_factor(drift_sums(rollout, current, trajectory, 4), trajectory, advantages, 0.1)
        for one in range(4):
            own = trajectory == one
            mean = (rollout[own].double() - current[own].double()).mean().item()
            wanted = 0.0 if advantages[own][0] < 0 and mean > 0.1 else 1.0
            assert factor[own].tolist() == [wanted] * LENGTHS[one]
            states.add((bool(advantages[own][0] < 0), mean > 0.1))
    assert len(states) == 4


def test_advantages_of_tokens_are_looked_at_one_by_one():
    rollout, current = torch.zeros(4), torch.full((4,), -1.0)
    trajectory = torch.zeros(4, dtype=torch.int64)
    advantages = torch.tensor([1.0, -1.0, 0.0, -0.5])
    sums = drift_sums(rollout, current, trajectory, 1)
    assert off_policy_factor(sums, trajectory, advantages, 0.5).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert off_policy_factor(sums, trajectory, advantages, 1.0).tolist() == [1.0] * 4, "it must be above delta"


def test_sums_have_the_same_bits_in_any_order_and_cut():
    random = torch.Generator().manual_seed(0)
    count = 3000
    rollout, current = -10.0 * torch.rand(2, count, generator=random)
    trajectory = torch.randint(7, (count,), generator=random)
    whole = drift_sums(rollout, current, trajectory, 7)
    order = torch.randperm(count, generator=random)
    parts = sum(drift_sums(rollout[p], current[p], trajectory[p], 7) for p in order.split([17, 983, 1000, 1000]))
    assert torch.equal(whole, parts)
    plain = torch.zeros(7, dtype=torch.float64).index_add_(0, trajectory, rollout.double() - current.double())
    torch.testing.assert_close(whole[0], plain, rtol=0, atol=count * 2.0**-25)


def test_a_trajectory_without_tokens_masks_nothing():
    empty = torch.zeros(0)
    sums = drift_sums(empty, empty, empty.long(), 3)
    assert sums.tolist() == [[0.0] * 3] * 2
    assert off_policy_factor(sums, torch.tensor([1]), torch.tensor([-1.0]), 0.1).tolist() == [1.0]
