"""This module holds the settings of one environment, an entry of [[environments]]."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import PluginConfig, Section, as_plugin


class FormatPattern(Section):
    """Holds a custom format as a regular expression."""

    pattern: str = Field(min_length=1)
    """A regular expression of Python that is searched for in the last turn's text; `.` matches line ends as well."""
    timeout_s: float = Field(1.0, gt=0)
    """Seconds that one search may take. A text for which it takes longer does not have the format, which is counted in
    environment/format_timeout/mean."""

    @field_validator("pattern")
    @classmethod
    def compiles(cls, pattern: str) -> str:
        """Refuse what is no regular expression."""
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error}); correct it") from None
        return pattern


class EnvironmentConfig(PluginConfig):
    """Says which environment gives tasks and within which bounds it works. Its tasks are a domain of the prompts."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$")
    """The domain's name in metrics, files and budgets."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this environment, relative to the others."""
    curriculum_steps: int | None = Field(None, ge=1)
    """Steps in which the training tasks are taken from easy to hard: a step draws from the first tasks alone, a part
    that grows evenly from `curriculum_start` to all. The environment gives its tasks in order of difficulty (`chat` and
    `math` by their option `difficulty`). Unset: all tasks are drawn from the start."""
    curriculum_start: float = Field(0.1, gt=0, le=1)
    """Part of the training tasks from which the first step of `curriculum_steps` draws."""
    deadline_s: float = Field(60.0, gt=0)
    """Seconds that the environment may work on one trajectory; the time in which the policy samples is not counted."""
    step_budget_s: float | None = Field(None, gt=0)
    """Seconds that the environment may work on all trajectories of one step (of a data-parallel leader). When half of
    them are spent, calls that take longer than an equal part of the rest fail; at the end all others do. Unset: ten
    times `deadline_s`."""
    on_failure: Literal["error", "zero", "drop"] = "error"
    """What happens when the environment raises, exceeds a bound or dies. error: the run stops and names the task; zero:
    the trajectory gets reward 0; drop: the trajectory is left out of its group. Each failure is counted in metrics and
    written to <run folder>/environments."""
    workers: int = Field(2, ge=1)
    """Worker processes of each data-parallel leader."""
    concurrent: int = Field(64, ge=1)
    """Conversations (`run`) that share a worker. `score` runs one call at a time."""
    memory_gib: float = Field(4.0, gt=0)
    """Memory that one worker may allocate (GiB)."""
    output_kib: int = Field(4096, ge=1)
    """Largest output of one trajectory (KiB): its messages to the policy and its outcome together."""
    start_timeout_s: float = Field(120.0, gt=0)
    """Seconds that a worker may take to import the class and to make an instance."""
    reward_weights: dict[str, float] | None = None
    """Weight of each component of the reward (`Outcome.rewards`): the reward is their weighted sum. "reward" stands for
    the environment's own reward. A component without a weight, or a weight without a component, is refused by name at
    the first outcome. Unset: the environment's own reward counts, and components are logged only."""
    format: Literal["think", "boxed"] | FormatPattern | None = None
    """Adds the component "format": 1 where the last turn's text has this format, else 0. think: one block of reasoning
    that ends with `</think>`, and an answer behind it; boxed: a `\\boxed{...}` that is not empty; or a table with a
    `pattern`."""
    group_reward: PluginConfig | None = None
    """Compares the samples of a task with each other, after the environment has scored them. shorter: adds the
    component "shorter", from 0.5 for the shortest to -0.5 for the longest, never above 0 for a wrong answer
    (arXiv:2501.12599, section 2.3.3); or the import path of a class of your own (docs/environments.md)."""
    python: Path | None = None
    """Interpreter of the workers, where the environment needs packages that the trainer must not have. Unset: the
    trainer's own. It needs Python 3.10 or newer and nothing else."""

    @field_validator("group_reward", mode="before")
    @classmethod
    def group_reward_as_plugin(cls, value: object) -> object:
        """Take a string for a table with that `use`."""
        return as_plugin(value)

    @property
    def step_seconds(self) -> float:
        """Return `step_budget_s`, or what holds where it is unset."""
        return 10 * self.deadline_s if self.step_budget_s is None else self.step_budget_s

    @model_validator(mode="after")
    def a_step_is_longer_than_a_trajectory(self) -> "EnvironmentConfig":
        if self.step_seconds < self.deadline_s:
            raise ValueError(
                f"environment {self.name!r}: step_budget_s = {self.step_budget_s:g} is below deadline_s = "
                f"{self.deadline_s:g}, the time of one trajectory; raise one or lower the other"
            )
        return self
