"""Settings of metrics and samples: [telemetry]."""

from pydantic import Field

from fiberpo_megatron.settings import Section


class TelemetryConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard event files to <run folder>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package and WANDB_API_KEY."""
    rollouts_per_step: int = Field(4, ge=0)
    """Trajectories written as text to <run folder>/rollouts each step."""
