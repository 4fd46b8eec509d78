"""This module adds the log-likelihood of the step's own right answers to the objective."""

from dataclasses import replace

import numpy as np
import torch

from fiberpo_megatron.trainer.terms.base import Contribution, GateTokens, Prepared, StepStart, Term
from fiberpo_megatron.types import concatenated_response_tokens

SHARE = "supervised"
"""Name of the tokens' values: 1/(response tokens of correct trajectories, over all ranks) at these tokens, else 0."""


class SupervisedTerm(Term):
    """Adds the coefficient times the mean log-prob of the response tokens of a mini-batch's correct trajectories
    (VAPO, arXiv:2504.05118, section 4.3).

    The mean is over the tokens of all ranks. A mini-batch without a correct trajectory gets nothing. Weights and masks
    of the objective have no part in it.
    """

    name = "supervised"

    def __init__(self, coefficient: float) -> None:
        self._coefficient = coefficient

    def prepare(self, step: StepStart) -> Prepared:
        """Leave at each token its share in the mean, for the gate's calls."""
        rollouts, layout = step.rollouts, step.layout
        chosen = []
        for part in step.parts:
            tokens = concatenated_response_tokens(part.micro_batches).numpy()
            trajectory = np.searchsorted(rollouts.offsets, tokens, side="right") - 1
            chosen.append(torch.from_numpy(rollouts.correct[trajectory]).double())
        counts = torch.tensor([[float(of.sum()), float(len(of))] for of in chosen], dtype=torch.float64)
        correct, tokens_of_part = layout.sum_over_tokens(counts).unbind(1)
        parts = [
            replace(part, term_values={**part.term_values, SHARE: of / max(float(count), 1.0)})
            for part, of, count in zip(step.parts, chosen, correct)
        ]
        return Prepared(parts, {"supervised/token_share": float(correct.sum() / tokens_of_part.sum())})

    def coefficients(self, tokens: GateTokens) -> Contribution:
        """Return the coefficient times each token's share, and the mean log-prob."""
        share = tokens.values[SHARE]
        sums = {"supervised/log_prob": (share * tokens.log_probs.double()).sum()}
        return Contribution(self._coefficient * share, None, sums)
