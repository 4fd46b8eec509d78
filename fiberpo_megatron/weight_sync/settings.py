"""This module defines the settings of the publication of weights: [weight_sync]."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import PluginConfig, Section, as_plugin

FLAT = {"disk": ("folder", "delta"), "distributed": ("bucket_mib",), "ipc": ("bucket_mib",)}
"""Settings of [weight_sync] that are options of this package's publishers."""


class WeightSyncConfig(Section):
    method: PluginConfig = PluginConfig(use="distributed")
    """How weights reach the engines. distributed: the ranks broadcast them (NCCL, gloo without a GPU); ipc: engines on
    the ranks' own GPUs, or machines, read memory that both share; disk: through a safetensors folder that all ranks and
    engines see; or the import path of a class of your own (docs/extending.md), with its options:
    method = {use = "my_package.rdma:Rdma", options = {chunk_mib = 64}}."""
    folder: Path | None = None
    """Folder for `disk`. Unset: <run folder>/published."""
    delta: bool | None = None
    """Let `disk` write only what changed since the publication before, for engines that read the folder over a slow
    network; each engine keeps a copy of the weights in its temporary folder, and each rank one of its share in host
    memory. It needs engines that this package starts. Unset: false."""
    timeout_s: float = Field(900.0, gt=0)
    """Seconds that one publication may take."""
    bucket_mib: int | None = Field(None, ge=1)
    """Weights that `distributed` and `ipc` send in one round, all ranks together (MiB). Unset: 256."""
    verify_every: int = Field(1, ge=0)
    """After every so many publications an engine scores a probe, compared with the trainer's log-probs; 0 never."""
    verify_tolerance: float = Field(0.05, gt=0)
    """Largest mean |log-prob difference| of the probe; 1e-3 is right in float32. In bfloat16 a first difference above
    it is a warning, unless it is ten times as large, and later ones may be twice the smallest that was measured."""

    @field_validator("method", mode="before")
    @classmethod
    def method_is_a_plugin(cls, value: object) -> object:
        return as_plugin(value)

    @model_validator(mode="after")
    def flat_settings_have_a_reader(self) -> "WeightSyncConfig":
        names = dict.fromkeys(name for of_method in FLAT.values() for name in of_method)
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
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
        """Return the options of the method: `method.options`, and the flat settings of a built-in one that are set."""
        flat = {name: getattr(self, name) for name in FLAT.get(self.method.use, ())}
        return {**self.method.options, **{name: value for name, value in flat.items() if value is not None}}
