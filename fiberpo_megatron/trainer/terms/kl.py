"""This module subtracts a KL divergence from a reference: from the objective, or from every token's advantage."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from fiberpo_megatron.terms.kl import adapted, kl_estimate
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.trainer.term_settings import KlConfig
from fiberpo_megatron.trainer.terms.base import Contribution, GateTokens, Prepared, StepStart, Term
from fiberpo_megatron.types import TokenScores


class KlTerm(Term):
    """Subtracts beta times the mean KL divergence of the policy from the reference (`terms.kl`)."""

    name = "kl"
    needs_reference = True

    def __init__(self, settings: KlConfig) -> None:
        self._settings = settings
        self.coefficient = settings.coefficient

    def prepare(self, step: StepStart) -> Prepared:
        """Measure the divergence of the policy that sampled; in the reward, subtract it from the advantages."""
        sums = torch.zeros(3, dtype=torch.float64)
        parts = []
        for given, scores in zip(step.parts, step.scores):
            part = _known(given, scores)
            old, reference = scores.log_probs.double().cpu(), _reference(part)
            k1, _ = kl_estimate("k1", old, reference, old)
            k3, _ = kl_estimate("k3", old, reference, old)
            weights = part.weights.double().cpu()
            sums += torch.stack([(weights * k3).sum(), (weights * k1).sum(), weights.sum()])
            parts.append(self._rewarded(part, scores))
        k3_sum, k1_sum, total = step.layout.sum_over_tokens(sums).tolist()
        metrics = {"kl/mean": k3_sum / total, "kl/k1_mean": k1_sum / total, "kl/coefficient": self.coefficient}
        return Prepared(parts, metrics)

    def _rewarded(self, part: MiniBatch, scores: TokenScores) -> MiniBatch:
        if self._settings.where != "reward":
            return part
        old = scores.log_probs.cpu()
        value, _ = kl_estimate(self._settings.estimator, old, _reference(part), old)
        advantages = part.advantages.double() - self.coefficient * value
        return replace(part, advantages=advantages.to(part.advantages.dtype))

    def coefficients(self, tokens: GateTokens) -> Contribution:
        """Return -beta mu_j dk_j / d log pi, where the divergence is a loss."""
        if self._settings.where != "loss":
            return Contribution()
        assert tokens.reference_log_probs is not None, "the step brings the reference's log-probs"
        value, slope = kl_estimate(
            self._settings.estimator, tokens.log_probs, tokens.reference_log_probs, tokens.old_log_probs
        )
        sums = {"kl/loss": self.coefficient * (tokens.weights * value).sum()}
        return Contribution(-self.coefficient * tokens.weights * slope, None, sums)

    def update(self, metrics: Mapping[str, float], trajectories: int) -> None:
        """Move the coefficient so that the divergence comes to the target."""
        if self._settings.target is not None:
            share = trajectories / self._settings.horizon
            self.coefficient = adapted(self.coefficient, metrics["kl/mean"], self._settings.target, share)

    def state(self) -> dict[str, float]:
        """Return the steered coefficient."""
        return {"coefficient": self.coefficient} if self._settings.target is not None else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take back a steered coefficient; a fixed one stays the config's."""
        if self._settings.target is not None:
            self.coefficient = float(state["coefficient"])


def _known(part: MiniBatch, scores: TokenScores) -> MiniBatch:
    """The part with the old log-prob of a token that the reference's server could not score (nan), so that it has no
    divergence: SGLang 0.5 cannot score the last token of a vocabulary."""
    reference = _reference(part)
    if not reference.isnan().any():
        return part
    return replace(part, reference_log_probs=torch.where(reference.isnan(), scores.log_probs.cpu(), reference))


def _reference(part: MiniBatch) -> torch.Tensor:
    assert part.reference_log_probs is not None, "the step brings the reference's log-probs"
    return part.reference_log_probs.cpu()
