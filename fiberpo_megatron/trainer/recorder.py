"""The run folder as the loop writes it: metrics, samples, checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fiberpo_megatron.config.schema import CheckpointConfig
from fiberpo_megatron.mcore import checkpoint
from fiberpo_megatron.telemetry.gpu import GpuMonitor, gpu_metrics
from fiberpo_megatron.telemetry.metrics import Kind
from fiberpo_megatron.telemetry.rollout_log import write_rollouts
from fiberpo_megatron.telemetry.sinks import Sinks
from fiberpo_megatron.types import Layout, Policy, RolloutGroup


@dataclass(frozen=True)
class RunRecorder:
    """Implements the loop's Recorder: metrics from the logging rank, samples from the first leader."""

    folder: Path
    layout: Layout
    sinks: Sinks | None
    """None on ranks that do not log."""
    gpu: GpuMonitor
    domains: Sequence[str]
    samples: int
    """Trajectories written per step."""

    def record(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        if self.sinks is not None:
            self.sinks.write(step, kind, {**metrics, **gpu_metrics(self.gpu.read())})

    def rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        if self.layout.is_leader and self.layout.data_rank == 0:
            trajectories = [t for group in groups for t in group.trajectories]
            write_rollouts(self.folder, step, trajectories, count=self.samples, domains=self.domains)


@dataclass(frozen=True)
class RunCheckpoints:
    """Implements the loop's Checkpoints in <run folder>/checkpoints."""

    folder: Path
    settings: CheckpointConfig

    def save(self, policy: Policy, step: int) -> None:
        policy.save(str(checkpoint.step_folder(self.folder, step)), {"step": step})
        if policy.layout.rank == 0:
            checkpoint.prune(self.folder, self.settings.keep)
