"""This module holds the settings of evaluations, [evaluation] and [[evaluation.sets]]."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.settings import Section

RESERVED = frozenset({"accuracy", "environment", "groups", "response_length", "reward"})
"""Names that a set cannot have, because metrics of the default set begin with them."""
DEFAULT_SET = "held_out"
"""What the default set is called in files of results."""


class EvaluationSet(Section):
    """This set names prompts on which the policy is measured, and says how it is sampled there."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$")
    """The set's name in metrics (eval/NAME/avg@8) and files."""
    environment: str | EnvironmentConfig
    """The name of one of [[environments]], or a table with `use`, `options` and the other settings of an environment of
    the set's own, whose tasks are never trained on. Such an environment has the set's name and needs no `name`."""
    split: Literal["held_out", "train"] = "held_out"
    """Which tasks of the environment are used. For an environment of the set's own "train" is as good as "held_out"."""
    prompts: int | None = Field(None, ge=1)
    """The first so many tasks of the split, or fewer where it has fewer. Unset: all."""
    samples: int = Field(1, ge=1)
    """Sampled responses to each prompt: the n of avg@n and maj@n."""
    pass_at: list[Annotated[int, Field(ge=1)]] = []
    """Each k for which pass@k is estimated; none is larger than `samples`."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature of this set; 0 always takes the most likely token. Unset: rollout.temperature."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling mass of this set. Unset: rollout.top_p."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Response tokens after which a response of this set is cut. Unset: rollout.max_response_tokens."""
    every_steps: int | None = Field(None, ge=0)
    """Evaluate this set every so many steps; 0: only before the first and after the last step. Unset:
    evaluation.every_steps."""

    @model_validator(mode="before")
    @classmethod
    def name_its_environment(cls, values: Any) -> Any:
        """Give an environment of the set's own the set's name."""
        if isinstance(values, Mapping) and isinstance(values.get("environment"), Mapping) and "name" in values:
            own = values["environment"]
            if own.get("name", values["name"]) != values["name"]:
                raise ValueError(
                    f"evaluation set {values['name']!r}: its own environment is called {own['name']!r}; leave `name` "
                    "out of the table, because it has the set's name"
                )
            return {**values, "environment": {**own, "name": values["name"]}}
        return values

    @model_validator(mode="after")
    def can_be_measured(self) -> "EvaluationSet":
        """Refuse names that metrics need, and a k for which too few samples are drawn."""
        if self.name in RESERVED or self.name == DEFAULT_SET:
            raise ValueError(
                f"evaluation set {self.name!r}: metrics and files of the default set use this name; choose another"
            )
        beyond = [k for k in self.pass_at if k > self.samples]
        if beyond:
            raise ValueError(
                f"evaluation set {self.name!r}: pass_at has {beyond[0]}, but only samples = {self.samples} responses "
                f"are drawn; raise samples to {beyond[0]} or leave it out"
            )
        return self

    @property
    def metrics(self) -> list[str]:
        """Return the names of the set's metrics: shares with their intervals, and means."""
        shares = [f"avg@{self.samples}", *(f"pass@{k}" for k in self.pass_at)]
        shares += [f"maj@{self.samples}"] if self.samples > 1 else []
        means = ["reward/mean", "response_length/mean", "truncated_share", "failed_share"]
        return [f"{self.name}/{name}" for name in (*(s + end for s in shares for end in ("", "/low", "/high")), *means)]

    @property
    def own_environment(self) -> EnvironmentConfig | None:
        """Return the environment whose tasks this set alone uses, if it has one."""
        return self.environment if isinstance(self.environment, EnvironmentConfig) else None

    @property
    def environment_name(self) -> str:
        """Return the name of the environment that gives the tasks."""
        return self.environment if isinstance(self.environment, str) else self.environment.name


class EvaluationConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Evaluate on held-out prompts every so many steps; 0: only before the first and after the last step."""
    prompts: int = Field(128, ge=0)
    """Held-out prompts of the default set, all of [[environments]] in turn; 0 leaves the default set out."""
    samples_per_prompt: int = Field(1, ge=1)
    """Sampled responses per prompt of the default set, at the rollout's temperature."""
    sets: list[EvaluationSet] = []
    """Further sets, one table each, with prompts, sampling and metrics of their own."""

    @model_validator(mode="after")
    def set_names_differ(self) -> "EvaluationConfig":
        """Refuse two sets of one name."""
        names = [one.name for one in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluation.sets: the name {twice[0]!r} is used twice; give each set its own `name`")
        return self

    @property
    def own_environments(self) -> list[EnvironmentConfig]:
        """Return the environments that only sets use, in the order of the sets."""
        return [own for one in self.sets if (own := one.own_environment) is not None]
