"""Turn a teacher's log-probs into token-level advantages: on-policy distillation by the reverse KL divergence.

The policy pi samples, and the teacher scores what it sampled. KL(pi || teacher) of a next-token distribution is the
mean of log pi(a) - log teacher(a) over the policy's own samples a, so that its negative, token by token, is an
advantage whose policy gradient descends the divergence (arXiv:2306.13649 with the reverse KL; arXiv:2306.08543).

Each token has its own term alone: later tokens' terms are not added to it (a discount of 0), as in "On-Policy
Distillation" of Thinking Machines (Lu et al., 2025). The sum to the end of the trajectory would be the gradient of the
divergence between whole trajectories, with far more variance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DistillationAdvantages:
    """Holds what `distillation_advantages` returns."""

    values: Tensor
    """float64 [n]; 0 where the teacher gave no log-prob."""
    clipped: Tensor
    """bool [n], where the bound acts"""
    known: Tensor
    """bool [n], where the teacher gave a log-prob"""


def distillation_advantages(
    old: Tensor, teacher: Tensor, coefficient: float, clip: float | None
) -> DistillationAdvantages:
    """Return coefficient x (log teacher(a) - log pi_old(a)), with the difference held in [-clip, clip].

    `old` and `teacher` are log-probs [n] of the sampled tokens at the same temperature; nan in `teacher` says that it
    is not known.
    """
    known = ~teacher.isnan()
    difference = torch.where(known, teacher.double() - old.double(), 0.0)
    clipped = torch.zeros_like(known) if clip is None else difference.abs() > clip
    if clip is not None:
        difference = difference.clamp(-clip, clip)
    return DistillationAdvantages(coefficient * difference, clipped, known)
