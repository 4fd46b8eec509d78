"""Reverse KL as token-level advantages: values by hand, and that their policy gradient is that of the divergence."""

import math

import pytest
import torch

from fiberpo_megatron.terms.distillation import distillation_advantages


def test_values_by_hand():
    old = torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.0])
    teacher = torch.tensor([-0.5, -4.0, -0.5, math.nan, -9.0])
    found = distillation_advantages(old, teacher, 2.0, clip=3.0)
    assert found.values.tolist() == [1.0, -4.0, 0.0, 0.0, -6.0]
    assert found.clipped.tolist() == [False, False, False, False, True]
    assert found.known.tolist() == [True, True, True, False, True]
    free = distillation_advantages(old, teacher, 2.0, clip=None)
    assert free.values.tolist() == [1.0, -4.0, 0.0, 0.0, -16.0] and not free.clipped.any()


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_the_policy_gradient_is_that_of_the_reverse_divergence(coefficient: float):
    """By enumeration of a vocabulary: E[A grad log pi] = -coefficient grad KL(pi || teacher), by finite differences."""
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 9, generator=random, dtype=torch.float64)
    teacher = teacher.log_softmax(-1)

    def divergence(at: torch.Tensor) -> float:
        log_pi = at.log_softmax(-1)
        return float((log_pi.exp() * (log_pi - teacher)).sum())

    log_pi = logits.log_softmax(-1)
    advantages = distillation_advantages(log_pi, teacher, coefficient, None).values
    free = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad((log_pi.exp() * advantages * free.log_softmax(-1)).sum(), free)
    h = 1e-5
    steps = h * torch.eye(9, dtype=torch.float64)
    slope = torch.tensor([(divergence(logits + step) - divergence(logits - step)) / (2 * h) for step in steps])
    torch.testing.assert_close(found, -coefficient * slope.double(), rtol=1e-6, atol=1e-8)
