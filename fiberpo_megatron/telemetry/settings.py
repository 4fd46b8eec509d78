"""This module defines the settings of metrics and samples: [telemetry]."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import PluginConfig, Section, as_plugin
from fiberpo_megatron.telemetry.alarms.settings import AlarmsConfig


class TelemetryConfig(Section):
    alarms: AlarmsConfig = AlarmsConfig()
    sinks: list[PluginConfig] = []
    """Further places that metrics go to, besides metrics.jsonl and the console: short names (tensorboard, wandb), or
    import paths of classes of your own (docs/extending.md), with their options:
    sinks = [{use = "my_package.mlflow:MlflowSink", options = {experiment = "sums"}}]."""
    tensorboard: bool = True
    """Write TensorBoard event files to <run folder>/tensorboard. The same as the sink "tensorboard"."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package and WANDB_API_KEY. The same as the sink "wandb" with the option
    `project`."""
    rollouts_per_step: int = Field(4, ge=0)
    """Trajectories written as text to <run folder>/rollouts each step, and held-out ones of each evaluation."""
    tokens_per_step: int = Field(16_384, ge=0)
    """Bound on the tokens of which <run folder>/tokens gets everything that the step did to them: log ratio,
    coefficient, gates of every level, experts (docs/watch.md). They are those of the trajectories that
    `rollouts_per_step` writes, as far as whole ones fit; longer ones need a larger bound. 0: none."""
    rollout_steps_kept: int = Field(500, ge=2)
    """Steps whose files stay in <run folder>/rollouts and <run folder>/tokens: the newest half of this number, and of
    the older steps a selection spread over the whole run. Only people, the report and the live page need these files;
    `storage.dump` keeps every trajectory."""

    trace_steps_kept: int = Field(50, ge=0)
    """Steps whose trace stays in <run folder>/traces: what every trajectory did, and when (docs/watch.md). They are the
    newest half of this number, and of the older steps a selection spread over the whole run. 0: no traces."""

    @field_validator("trace_steps_kept")
    @classmethod
    def a_selection_needs_two(cls, value: int) -> int:
        if value == 1:
            raise ValueError("it is 1, but at least the traces of 2 steps are kept; use 2 or more, or 0 for none")
        return value

    @field_validator("sinks", mode="before")
    @classmethod
    def sinks_are_plugins(cls, value: Any) -> Any:
        return [as_plugin(sink) for sink in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def wandb_is_named_once(self) -> "TelemetryConfig":
        if self.wandb_project is not None and any(sink.use == "wandb" for sink in self.sinks):
            raise ValueError(
                f'telemetry.wandb_project = "{self.wandb_project}" and the sink "wandb" in telemetry.sinks are the '
                "same; remove one of them"
            )
        return self

    def all_sinks(self) -> list[PluginConfig]:
        """Return all sinks besides metrics.jsonl and the console, those with a setting of their own first."""
        own = []
        if self.tensorboard and all(sink.use != "tensorboard" for sink in self.sinks):
            own.append(PluginConfig(use="tensorboard"))
        if self.wandb_project is not None:
            own.append(PluginConfig(use="wandb", options={"project": self.wandb_project}))
        return [*own, *self.sinks]
