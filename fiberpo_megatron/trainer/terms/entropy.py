"""This module adds the entropy of the next-token distributions to the objective, by a fixed or a steered factor."""

from collections.abc import Mapping

import torch

from fiberpo_megatron.trainer.term_settings import EntropyConfig
from fiberpo_megatron.trainer.terms.base import Contribution, GateTokens, Prepared, StepStart, Term


class EntropyTerm(Term):
    """Adds the coefficient times the mean entropy of the distributions of the response tokens, with its true
    gradient."""

    name = "entropy"

    def __init__(self, settings: EntropyConfig) -> None:
        self._settings = settings
        self.coefficient = settings.coefficient

    def prepare(self, step: StepStart) -> Prepared:
        """Measure the mean entropy, by the tokens' weights, of the policy that the step begins with."""
        sums = torch.zeros(2, dtype=torch.float64)
        for part, scores in zip(step.parts, step.scores):
            weights = part.weights.double().cpu()
            sums += torch.stack([(weights * scores.entropy.double().cpu()).sum(), weights.sum()])
        mean, total = step.layout.sum_over_tokens(sums).tolist()
        metrics = {"entropy_bonus/mean": mean / total, "entropy_bonus/coefficient": self.coefficient}
        return Prepared(list(step.parts), metrics)

    def coefficients(self, tokens: GateTokens) -> Contribution:
        """Return mu_j times the coefficient, which is dJ / dH_j."""
        return Contribution(entropy=self.coefficient * tokens.weights)

    def update(self, metrics: Mapping[str, float], trajectories: int) -> None:
        """Move the coefficient towards the target, one step up or down."""
        settings = self._settings
        if settings.target is not None:
            up = metrics["entropy_bonus/mean"] < settings.target
            self.coefficient = max(0.0, self.coefficient + (settings.step if up else -settings.step))

    def state(self) -> dict[str, float]:
        """Return the steered coefficient."""
        return {"coefficient": self.coefficient} if self._settings.target is not None else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take back a steered coefficient; a fixed one stays the config's."""
        if self._settings.target is not None:
            self.coefficient = float(state["coefficient"])
