"""Estimate the KL divergence of the policy from a reference at sampled tokens, with each estimator's gradient.

With d = log pi(a) - log ref(a) and x = log pi(a) - log pi_old(a) of a token a that pi_old sampled:

    estimator   value k               dk / d log pi     mean of dk/dlogpi times the score, on-policy (x = 0)
    k1          d                     1                 0: a loss of k1 has no gradient but noise
    k2          d^2 / 2               d                 that of KL(pi || ref)
    k3          exp(-d) - 1 + d       1 - exp(-d)       that of KL(ref || pi)
    unbiased    exp(x) k3             exp(x) d          that of KL(pi || ref), off-policy too

The values of k1 and k3 have the mean KL(pi || ref) on-policy, that of `unbiased` also off-policy; k2's is biased, by
third-order terms. As a reward k is a constant that multiplies the score: there k1 has the mean of the gradient of
KL(pi || ref) and the others are biased (arXiv:2510.01555, arXiv:2506.09477).
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "unbiased"]
MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to +-20 (exp(20) = 4.9e8) before they are used, as those of the objectives are."""


def kl_estimate(estimator: Estimator, log_probs: Tensor, reference: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Return (k, dk / d log pi), both float64 [n], of sampled tokens.

    `log_probs`, `reference` and `old` are the log-probs [n] of the tokens under the policy, the reference and the
    policy that is taken to have sampled them; `old` is read by "unbiased" alone. Beyond the clamp of the log ratios
    the derivative keeps its value at the clamp, so that the pull towards the reference does not vanish.
    """
    d = (log_probs.double() - reference.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d.square() / 2, d
    k3 = torch.expm1(-d) + d
    if estimator == "k3":
        return k3, -torch.expm1(-d)
    ratio = (log_probs.double() - old.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratio * k3, ratio * d


def adapted(coefficient: float, divergence: float, target: float, share: float) -> float:
    """Return the next coefficient of a penalty that steers a mean KL divergence to `target`.

    It is multiplied by 1 + share x clip(divergence / target - 1, -0.2, 0.2) (Ziegler et al., arXiv:1909.08593, section
    2.2, where the share K_beta is 0.1). The result stays finite and positive.
    """
    error = min(0.2, max(-0.2, divergence / target - 1.0))
    return coefficient * (1.0 + min(1.0, share) * error)
