"""This package makes the terms that a run adds to its objective; `base.py` says what a term is.

The mathematics is in `fiberpo_megatron.terms`; docs/objectives.md lists the terms.
"""

from fiberpo_megatron.trainer.settings import AlgorithmConfig
from fiberpo_megatron.trainer.terms.base import Contribution, GateTokens, Mask, Prepared, StepStart, Term
from fiberpo_megatron.trainer.terms.collection import Terms
from fiberpo_megatron.trainer.terms.entropy import EntropyTerm
from fiberpo_megatron.trainer.terms.kl import KlTerm

__all__ = ["Contribution", "GateTokens", "Mask", "Prepared", "StepStart", "Term", "Terms", "build_terms"]


def build_terms(algorithm: AlgorithmConfig) -> Terms:
    """Return the terms that are on. Masks come first, because they change the weights that the others see."""
    terms: list[Term] = []
    if algorithm.kl.coefficient > 0:
        terms.append(KlTerm(algorithm.kl))
    if algorithm.entropy.coefficient > 0 or algorithm.entropy.target is not None:
        terms.append(EntropyTerm(algorithm.entropy))
    return Terms(terms)
