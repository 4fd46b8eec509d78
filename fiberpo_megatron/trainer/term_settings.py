"""This module defines the settings of what is added to an objective: one section of [algorithm] for each term."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fiberpo_megatron.engines.settings import ScoringServers
from fiberpo_megatron.settings import Section


class OverlongConfig(Section):
    """These settings lower the reward of responses near the length limit (DAPO, arXiv:2503.14476, equation 13)."""

    cache_tokens: int | None = Field(None, ge=1)
    """Tokens before the limit over which the penalty falls from 0 to -1; it is added to the reward before advantages
    are estimated. Unset: no penalty. DAPO takes 4096, and leaves cut responses out besides (algorithm.truncated)."""
    limit_tokens: int | None = Field(None, ge=1)
    """Response tokens of a trajectory, all turns together, at which the penalty is -1. Unset:
    rollout.max_response_tokens."""

    @model_validator(mode="after")
    def cache_fits(self) -> "OverlongConfig":
        """Refuse a cache that begins before the response, and a limit that nothing reads."""
        if self.limit_tokens is not None and (self.cache_tokens is None or self.cache_tokens > self.limit_tokens):
            raise ValueError(
                f"algorithm.overlong: cache_tokens = {self.cache_tokens} must be set and at most limit_tokens = "
                f"{self.limit_tokens}; correct one of them"
            )
        return self


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
    servers: ScoringServers | None = None
    """SGLang servers of the reference, which score trajectories while others are sampled, in the place of weights in
    host memory and another forward pass: `servers = "http://host:port"`, or a table. They score at temperature 1, so
    that rollout.temperature must be 1."""
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
        if self.servers is not None and self.reference is not None:
            raise ValueError(
                f"algorithm.kl.reference = {self.reference} and algorithm.kl.servers name two references; keep one"
            )
        if self.servers is not None and self.coefficient == 0:
            raise ValueError(
                "algorithm.kl.servers would score every trajectory for nothing, because algorithm.kl.coefficient = 0; "
                "set a coefficient, or unset the servers"
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


class DistillationConfig(Section):
    """These settings make the policy follow a teacher on the policy's own trajectories, which an SGLang server of the
    teacher scores (docs/objectives.md). They are off without a `teacher`."""

    teacher: ScoringServers | None = None
    """SGLang servers of the teacher: `teacher = "http://host:port"`, a list of addresses, or a table. It must have the
    vocabulary of model.path, and scores at temperature 1: rollout.temperature must be 1, top_p 1 and top_k -1."""
    coefficient: float = Field(1.0, gt=0)
    """Factor of log teacher(a) - log pi_old(a), the negative reverse KL divergence at a sampled token, in its
    advantage."""
    reward_weight: float = Field(0.0, ge=0)
    """Factor of the advantage from rewards, which is added to it. 0 is pure distillation: rewards are logged alone, and
    one trajectory a prompt is enough."""
    clip: float | None = Field(None, gt=0)
    """Bound of |log teacher(a) - log pi_old(a)| in nats. Unset: none."""


class OffPolicyMaskConfig(Section):
    """These settings leave tokens of trajectories that have left the policy out of the objective: the off-policy
    sequence mask of DeepSeek-V3.2 (arXiv:2512.02556, equation 9)."""

    delta: float | None = Field(None, gt=0)
    """Mean over a trajectory's tokens of log(pi_rollout / pi), in nats, above which its tokens with a negative
    advantage have weight 0. pi_rollout are the engine's probabilities. Unset: the mask is off."""


class SupervisedConfig(Section):
    """These settings add the log-likelihood of the step's own right answers to the objective (VAPO, arXiv:2504.05118,
    section 4.3)."""

    coefficient: float = Field(0.0, ge=0)
    """Factor of the mean log-prob of the response tokens of correct trajectories; 0 switches the term off."""
