"""This package makes the terms that a run adds to its objective; `base.py` says what a term is.

The mathematics is in `fiberpo_megatron.terms`; docs/objectives.md lists the terms.
"""

from fiberpo_megatron.trainer.settings import AlgorithmConfig
from fiberpo_megatron.trainer.terms.base import Contribution, GateTokens, Mask, Prepared, StepStart, Term
from fiberpo_megatron.trainer.terms.collection import Terms
from fiberpo_megatron.trainer.terms.distillation import DistillationTerm
from fiberpo_megatron.trainer.terms.entropy import EntropyTerm
from fiberpo_megatron.trainer.terms.kl import KlTerm
from fiberpo_megatron.trainer.terms.off_policy import OffPolicyMask
from fiberpo_megatron.trainer.terms.supervised import SupervisedTerm

__all__ = ["Contribution", "GateTokens", "Mask", "Prepared", "StepStart", "Term", "Terms", "build_terms"]


def build_terms(algorithm: AlgorithmConfig) -> Terms:
    """Return the terms that are on. Distillation stands before a KL divergence in the reward: its reward_weight is not
    about that one."""
    terms: list[Term] = []
    if algorithm.off_policy_mask.delta is not None:
        terms.append(OffPolicyMask(algorithm.off_policy_mask.delta))
    if algorithm.distillation.teacher is not None:
        terms.append(DistillationTerm(algorithm.distillation))
    if algorithm.kl.coefficient > 0:
        terms.append(KlTerm(algorithm.kl))
    if algorithm.entropy.coefficient > 0 or algorithm.entropy.target is not None:
        terms.append(EntropyTerm(algorithm.entropy))
    if algorithm.supervised.coefficient > 0:
        terms.append(SupervisedTerm(algorithm.supervised.coefficient))
    return Terms(terms)
