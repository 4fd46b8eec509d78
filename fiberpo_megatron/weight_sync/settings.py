"""Settings of the publication of weights: [weight_sync]."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from fiberpo_megatron.settings import Section


class WeightSyncConfig(Section):
    method: Literal["disk", "distributed"] = "distributed"
    """distributed: rank 0 broadcasts to the engines (NCCL, gloo without GPU); disk: through a safetensors
    folder that every engine can read."""
    folder: Path | None = None
    """Folder for `disk`. Unset: <run folder>/published."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds that one publication may take."""
    bucket_mib: int = Field(256, ge=1)
    """Weights sent in one broadcast (MiB)."""
    verify_every: int = Field(1, ge=0)
    """After every so many publications an engine scores a probe, compared with the trainer's log-probs; 0 never."""
    verify_tolerance: float = Field(0.05, gt=0)
    """Largest mean |log-prob difference| of the probe; 1e-3 is right in float32."""
