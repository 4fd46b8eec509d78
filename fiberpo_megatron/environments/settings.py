"""This module holds the settings of one environment, an entry of [[environments]]."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fiberpo_megatron.settings import PluginConfig


class EnvironmentConfig(PluginConfig):
    """Says which environment gives tasks and within which bounds it works. Its tasks are a domain of the prompts."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$")
    """The domain's name in metrics, files and budgets."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this environment, relative to the others."""
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
    python: Path | None = None
    """Interpreter of the workers, where the environment needs packages that the trainer must not have. Unset: the
    trainer's own. It needs Python 3.10 or newer and nothing else."""

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
