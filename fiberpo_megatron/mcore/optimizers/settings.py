"""This module defines the settings of the optimizer: [optimizer]."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fiberpo_megatron.settings import PluginConfig, Section, as_plugin

ADAM_FIELDS = ("beta1", "beta2", "eps")


class OptimizerConfig(Section):
    kind: PluginConfig = PluginConfig(use="adam")
    """The optimizer: a short name (adam), or the import path of a class of your own (docs/extending.md), with its
    options: kind = {use = "my_package.lion:Lion", options = {beta1 = 0.95}}."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Decay after the warm-up, over `trainer.steps`, to `min_learning_rate`."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of a decaying schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps of linear warm-up from 0."""
    beta1: float | None = Field(None, ge=0, lt=1)
    """Decay of Adam's first moment per step. Unset: 0.9. Other optimizers take their numbers from `kind.options`."""
    beta2: float | None = Field(None, ge=0, lt=1)
    """Decay of Adam's second moment per step. Unset: 0.95."""
    eps: float | None = Field(None, gt=0)
    """Number added to Adam's denominator. Unset: 1e-8."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay per unit of learning rate. Norms and biases are not decayed."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    cpu_offload: bool = False
    """Keep master weights and the optimizer's state in host memory, except while the optimizer steps: they and the
    activations are then never on the device together. Costs two copies of them a step and changes no result."""

    @field_validator("kind", mode="before")
    @classmethod
    def kind_is_a_plugin(cls, value: object) -> object:
        return as_plugin(value)

    @model_validator(mode="after")
    def adam_fields_are_for_adam(self) -> "OptimizerConfig":
        given = self._adam_options()
        if given and not self._is_adam():
            name = next(iter(given))
            raise ValueError(
                f'optimizer.{name} = {given[name]} is a setting of Adam, but optimizer.kind = "{self.kind.use}"; '
                f"remove it, or write it as an option of that optimizer: optimizer.kind.options.{name}"
            )
        twice = [name for name in given if name in self.kind.options]
        if twice:
            raise ValueError(
                f"optimizer.{twice[0]} = {given[twice[0]]} and optimizer.kind.options.{twice[0]} = "
                f"{self.kind.options[twice[0]]} set the same number; remove one of them"
            )
        return self

    def options(self) -> dict[str, Any]:
        """Return the arguments of the optimizer's class: `kind.options`, and Adam's own settings where they are set."""
        return {**self.kind.options, **self._adam_options()}

    def _adam_options(self) -> dict[str, float]:
        return {name: value for name in ADAM_FIELDS if (value := getattr(self, name)) is not None}

    def _is_adam(self) -> bool:
        return self.kind.use in ("adam", "fiberpo_megatron.mcore.optimizers.adam:Adam")
