"""A bandit with tokens of five versions, in exact expectation over all actions: untruncated weights by token are
unbiased, no weights are not. Advantages are raw rewards: standardisation by the group is biased on its own."""

import math

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.fibration import build_objective, importance_weights

ACTIONS, LAG = 12, 4
REWARDS = torch.linspace(-1.0, 2.0, ACTIONS, dtype=torch.float64)[
    torch.randperm(12, generator=torch.Generator().manual_seed(1))
]


def versions() -> list[Tensor]:
    """Logits of the newest version and of the four before it, newest first: each one took a step of policy gradient."""
    logits = torch.randn(ACTIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [logits]
    for _ in range(LAG):
        found.append(found[-1] + 1.5 * policy_gradient(found[-1]))
    return found[::-1]


def policy_gradient(logits: Tensor) -> Tensor:
    """The gradient of the expected reward, in closed form."""
    p = logits.softmax(0)
    return p * (REWARDS - (p * REWARDS).sum())


def expected_gradient(method: str, objective: str, lags: list[int], **options: float) -> Tensor:
    """What a step gives in expectation: every action of every version is a token, weighed by how often that version
    draws it, and each version sampled an equal share of the batch."""
    logits = versions()
    old = logits[0].log_softmax(0)
    log_mu = torch.cat([logits[lag].log_softmax(0) for lag in lags])
    y = old.repeat(len(lags)) - log_mu
    tokens = torch.arange(ACTIONS * len(lags))
    keys = {"trajectory": tokens, "version": tokens // ACTIONS, "engine": torch.zeros_like(tokens)}
    counts = {"trajectory": len(tokens), "version": len(lags), "engine": 1}
    w = importance_weights(y, method, keys=keys, counts=counts, **options).weights
    made = build_objective(objective, kernels=False)
    out = made(
        torch.zeros(len(tokens), dtype=torch.float64),
        REWARDS.repeat(len(lags)),
        w * log_mu.exp() / len(lags),
        keys={key: keys["trajectory"] if key != "domain" else torch.zeros_like(tokens) for key in made.keys},
        counts=dict.fromkeys(made.keys, len(tokens)),
    )
    p = old.exp()
    score = torch.eye(ACTIONS, dtype=torch.float64) - p  # d log pi(a) / d logits, one row for each action
    return out.gradient @ score.repeat(len(lags), 1)


@pytest.mark.parametrize("lags", [[LAG], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("objective", ["reinforce", "fiberpo", "grpo"])
def test_untruncated_weights_by_token_are_unbiased(objective: str, lags: list[int]):
    wanted = policy_gradient(versions()[0])
    for method in ("token", "sequence"):  # a trajectory of one token is its token
        found = expected_gradient(method, objective, lags, cap=math.inf)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    off = expected_gradient("off", objective, lags)
    assert float((off - wanted).norm()) > 0.1 * float(wanted.norm()), "no correction is biased"


def test_truncation_and_masks_are_biased_and_nearer_than_nothing():
    """With the defaults; the ratios here lie in 0.29..2.5."""
    wanted = policy_gradient(versions()[0])
    off, *others = (
        float((expected_gradient(method, "reinforce", [LAG]) - wanted).norm())
        for method in ("off", "token", "icepop", "levels")
    )
    assert all(0.01 < error < 0.5 * off for error in others)


def test_without_staleness_every_method_is_exact():
    wanted = policy_gradient(versions()[0])
    for method in ("off", "token", "icepop", "sequence", "sequence-mask", "levels"):
        torch.testing.assert_close(expected_gradient(method, "reinforce", [0]), wanted, rtol=0, atol=1e-12)
