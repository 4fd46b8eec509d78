"""Settings of the optimizer: [optimizer]."""

from typing import Literal

from pydantic import Field

from fiberpo_megatron.settings import Section


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Decay after the warm-up, over `trainer.steps`, to `min_learning_rate`."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of a decaying schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps of linear warm-up from 0."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's first-moment decay."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's second-moment decay."""
    eps: float = Field(1e-8, gt=0)
    """Adam's denominator floor."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (none on norms and biases)."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    cpu_offload: bool = False
    """Keep master weights and moments in host memory, except while the optimizer steps: they and the activations are
    then never on the device together. Costs two copies of them a step; changes no result."""
