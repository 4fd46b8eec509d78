"""This module defines the settings of the publication of weights: [weight_sync]."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import PluginConfig, Section, as_plugin

FLAT = {"disk": "folder", "distributed": "bucket_mib"}
"""Settings of [weight_sync] that are options of one of this package's publishers."""


class WeightSyncConfig(Section):
    method: PluginConfig = PluginConfig(use="distributed")
    """How weights reach the engines. distributed: rank 0 broadcasts them (NCCL, gloo without a GPU); disk: through a
    safetensors folder that every engine can read; or the import path of a class of your own (docs/extending.md), with
    its options: method = {use = "my_package.cuda_ipc:CudaIpc", options = {chunk_mib = 64}}."""
    folder: Path | None = None
    """Folder for `disk`. Unset: <run folder>/published."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds that one publication may take."""
    bucket_mib: int | None = Field(None, ge=1)
    """Weights sent in one broadcast of `distributed` (MiB). Unset: 256."""
    verify_every: int = Field(1, ge=0)
    """After every so many publications an engine scores a probe, compared with the trainer's log-probs; 0 never."""
    verify_tolerance: float = Field(0.05, gt=0)
    """Largest mean |log-prob difference| of the probe; 1e-3 is right in float32."""

    @field_validator("method", mode="before")
    @classmethod
    def method_is_a_plugin(cls, value: object) -> object:
        return as_plugin(value)

    @model_validator(mode="after")
    def flat_settings_have_a_reader(self) -> "WeightSyncConfig":
        given = {name: value for name in FLAT.values() if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            option = f"weight_sync.method.options.{name}"
            if name in self.method.options:
                raise ValueError(
                    f"weight_sync.{name} = {value} and {option} = {self.method.options[name]} set the same; remove one "
                    "of them"
                )
            if self.method.use not in FLAT:
                raise ValueError(
                    f'weight_sync.{name} = {value}, but weight_sync.method = "{self.method.use}" does not read it; '
                    f"remove it, or write it as an option of that method: {option}"
                )
        return self

    def options(self) -> dict[str, Any]:
        """Return the options of the method: `method.options`, and the flat setting of a built-in one if it is set."""
        flat = FLAT.get(self.method.use)
        value = getattr(self, flat) if flat else None
        return {**self.method.options, **({flat: value} if flat and value is not None else {})}
