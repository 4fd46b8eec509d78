"""Estimators of a KL divergence: values and derivatives against finite differences, and their means by enumeration."""

import math

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.terms.kl import MAX_LOG_RATIO, Estimator, adapted, kl_estimate

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3", "unbiased")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_slope_is_the_derivative_of_the_value(estimator: Estimator):
    random = torch.Generator().manual_seed(0)
    log_probs, reference, old = -3.0 * torch.rand(3, 40, generator=random, dtype=torch.float64)
    h = 1e-5
    above, _ = kl_estimate(estimator, log_probs + h, reference, old)
    below, _ = kl_estimate(estimator, log_probs - h, reference, old)
    _, slope = kl_estimate(estimator, log_probs, reference, old)
    torch.testing.assert_close((above - below) / (2 * h), slope, rtol=1e-6, atol=1e-8)


def expected(logits: Tensor, sampler: Tensor, factor: Tensor) -> Tensor:
    """The mean over a sampler's tokens of `factor` [vocabulary] times the score, the gradient of log pi, in logits."""
    log_pi = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((sampler * factor.detach() * log_pi).sum(), logits)
    return gradient


def test_the_means_are_what_the_table_says():
    """By enumeration of a vocabulary, on-policy and off-policy, against the gradients of the divergences themselves."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=random, dtype=torch.float64, requires_grad=True)
    reference, old = torch.randn(2, 7, generator=random, dtype=torch.float64).log_softmax(-1)
    log_pi = logits.log_softmax(-1)
    pi, now = log_pi.exp().detach(), log_pi.detach()
    reverse, forward = (log_pi.exp() * (log_pi - reference)).sum(), (reference.exp() * (reference - log_pi)).sum()
    of_reverse, of_forward = (torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (reverse, forward))
    estimates = {name: kl_estimate(name, now, reference, now) for name in ESTIMATORS}
    means = {name: expected(logits, pi, slope) for name, (_, slope) in estimates.items()}
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(means["k1"], torch.zeros_like(logits), **exact)
    torch.testing.assert_close(means["k2"], of_reverse, **exact)
    torch.testing.assert_close(means["k3"], of_forward, **exact)
    torch.testing.assert_close(means["unbiased"], of_reverse, **exact)
    for name in ("k1", "k3", "unbiased"):
        torch.testing.assert_close((pi * estimates[name][0]).sum(), reverse.detach(), **exact)
    # in the reward the value is a constant: there k1 has the divergence's gradient, and k3 another one
    torch.testing.assert_close(expected(logits, pi, estimates["k1"][0]), of_reverse, **exact)
    assert (expected(logits, pi, estimates["k3"][0]) - of_reverse).abs().max() > 0.01
    # off-policy, with samples of another policy
    value, slope = kl_estimate("unbiased", now, reference, old)
    torch.testing.assert_close(expected(logits, old.exp(), slope), of_reverse, **exact)
    torch.testing.assert_close((old.exp() * value).sum(), reverse.detach(), **exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_tokens_are_finite_and_still_pulled_back(estimator: Estimator):
    log_probs, reference = torch.tensor([-200.0, -0.5]), torch.tensor([-0.5, -200.0])
    value, slope = kl_estimate(estimator, log_probs, reference, log_probs)
    assert value.isfinite().all() and slope.isfinite().all()
    if estimator != "k1":
        assert slope[0] < 0 < slope[1]
    assert slope.abs().max() <= math.exp(MAX_LOG_RATIO)


def test_the_coefficient_is_steered():
    """By hand: an error of 0.1 and a share of 0.1 move it by a hundredth, larger errors by a fifth of the share."""
    assert adapted(0.2, 1.1, 1.0, 0.1) == pytest.approx(0.2 * 1.01)
    assert adapted(0.2, 5.0, 1.0, 0.1) == pytest.approx(0.2 * 1.02)
    assert adapted(0.2, -3.0, 1.0, 0.1) == pytest.approx(0.2 * 0.98)
    assert adapted(0.2, 0.0, 1.0, 50.0) == pytest.approx(0.2 * 0.8)  # never more than a fifth at a time
