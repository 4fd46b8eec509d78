"""This module makes the policy follow a teacher: log-probs that a server gave become token-level advantages."""

from dataclasses import replace

import torch

from fiberpo_megatron.terms.distillation import distillation_advantages
from fiberpo_megatron.trainer.term_settings import DistillationConfig
from fiberpo_megatron.trainer.terms.base import Prepared, StepStart, Term


class DistillationTerm(Term):
    """Replaces each token's advantage A by reward_weight A + coefficient (log teacher - log pi_old)
    (`terms.distillation`)."""

    name = "distillation"

    def __init__(self, settings: DistillationConfig) -> None:
        self._settings = settings

    def prepare(self, step: StepStart) -> Prepared:
        """Replace the advantages. Raises ValueError when no token of the step was scored."""
        settings, parts = self._settings, []
        sums = torch.zeros(5, dtype=torch.float64)
        for part, scores in zip(step.parts, step.scores):
            if part.teacher_log_probs is None:
                raise ValueError(
                    "the step's rollouts have no teacher_log_probs, which algorithm.distillation needs; take them from "
                    "engines with algorithm.distillation.teacher set, or replay a dump that was made with it"
                )
            old, teacher = scores.log_probs.cpu(), part.teacher_log_probs.cpu()
            found = distillation_advantages(old, teacher, settings.coefficient, settings.clip)
            divergence = torch.where(found.known, old.double() - teacher.double(), 0.0)
            weights = part.weights.double().cpu() * found.known
            count = torch.tensor(float(len(old)), dtype=torch.float64)
            sums += torch.stack(
                [(weights * divergence).sum(), weights.sum(), found.known.sum(), found.clipped.sum(), count]
            )
            advantages = settings.reward_weight * part.advantages.double().cpu() + found.values
            parts.append(replace(part, advantages=advantages.to(part.advantages.dtype)))
        divergence_sum, weight, known, clipped, tokens = step.layout.sum_over_tokens(sums).tolist()
        if not known:
            raise ValueError(
                f"the teacher gave no log-prob of any of the step's {tokens:.0f} response tokens, so that there is "
                "nothing to distil; look at what algorithm.distillation.teacher answers"
            )
        metrics = {
            "distillation/reverse_kl": divergence_sum / weight,
            "distillation/clipped_share": clipped / known,
            "distillation/unknown_share": 1.0 - known / tokens,
        }
        return Prepared(parts, metrics)
