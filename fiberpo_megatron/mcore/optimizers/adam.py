"""This module describes Adam with decoupled weight decay, which Megatron-Core builds itself."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from fiberpo_megatron.mcore.optimizers.base import Optimizer

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from torch import Tensor

    from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig


class Adam(Optimizer):
    """This is Adam with decoupled weight decay (AdamW), fused where Transformer Engine or Apex is installed.

    `beta1` and `beta2` are the decays of the first and second moment per step; `eps` is added to the denominator.
    Raises ValueError for values outside [0, 1) and (0, infinity).
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} = {beta} must be at least 0 and less than 1")
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps = {eps} must be a finite number above 0")
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def build(
        self, chunks: "list[DistributedDataParallel]", settings: "OptimizerConfig", *, dtype: str, distributed: bool
    ) -> "MegatronOptimizer":
        """Return Megatron's own Adam."""
        from fiberpo_megatron.mcore.optimizers.build import megatron_adam
        from fiberpo_megatron.mcore.optimizers.sharded import sharded

        return sharded(megatron_adam(chunks, settings, self, dtype=dtype, distributed=distributed), self)

    def fresh_state(self, parameter: "Tensor") -> "dict[str, Tensor]":
        """Return both moments, zero. torch's AdamW also counts the steps of every parameter; the fused ones do not."""
        import torch
        from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

        state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        return {**state, "step": torch.tensor(0.0)} if USING_PYTORCH_OPTIMIZER else state

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of two float32 moments, as the fused Adam of a GPU keeps them."""
        return 8 * prod(shape)
