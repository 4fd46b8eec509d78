"""This module defines the settings of what is added to an objective: one section of [algorithm] for each term."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fiberpo_megatron.settings import Section


class KlConfig(Section):
    """These settings keep the policy near a reference, by a KL divergence of sampled tokens (docs/objectives.md)."""

    coefficient: float = Field(0.0, ge=0)
    """beta, the factor of the divergence in nats per token; 0 switches the term off. With `target` it is the first
    step's."""
    estimator: Literal["k1", "k2", "k3", "unbiased"] = "unbiased"
    """k1: log pi - log ref; k2: half its square; k3: ref / pi - 1 - log(ref / pi), GRPO's; unbiased: k3 times
    pi / pi_old, DeepSeek-V3.2's, whose gradient is that of the KL divergence off-policy too."""
    where: Literal["loss", "reward"] = "loss"
    """loss: the divergence is subtracted from the objective; reward: from each token's advantage, as a constant."""
    reference: Path | None = None
    """Hugging Face folder of the reference: a model of the same shape and vocabulary. Unset: the weights with which the
    run begins, which are those of `model.path`."""
    target: float | None = Field(None, gt=0)
    """Divergence in nats per token to which the coefficient is steered after every training step. Unset: the
    coefficient stays."""
    horizon: float = Field(10000.0, gt=0)
    """Trajectories over which a steered coefficient changes by about a fifth of itself at most."""

    @model_validator(mode="after")
    def settings_fit(self) -> "KlConfig":
        """Refuse an estimator in the reward that is none, and steering that cannot begin."""
        if self.where == "reward" and self.estimator == "unbiased" and self.coefficient > 0:
            raise ValueError(
                'algorithm.kl.estimator = "unbiased" is a loss: its factor pi / pi_old is 1 in a reward; set '
                'algorithm.kl.estimator = "k1", which is unbiased in the reward, or algorithm.kl.where = "loss"'
            )
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                f"algorithm.kl.target = {self.target} steers algorithm.kl.coefficient by factors, but that is 0; set "
                "it to a first value, such as 0.001"
            )
        return self


class EntropyConfig(Section):
    """These settings add the entropy of the next-token distributions to the objective (docs/objectives.md)."""

    coefficient: float = Field(0.0, ge=0)
    """Factor of the mean entropy in nats; with 0 and no `target` the term is off. With `target` it is the first
    step's."""
    target: float | None = Field(None, gt=0)
    """Mean entropy in nats to which the coefficient is steered: after every training step it grows by `step` where the
    entropy was below, and shrinks by `step` where it was above. Unset: the coefficient stays."""
    step: float = Field(0.0005, gt=0)
    """Change of a steered coefficient in a training step."""
