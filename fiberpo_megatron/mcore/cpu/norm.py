"""This module builds RMSNorm for the CPU platform."""

from typing import Any

import torch


class RmsNorm:
    """Builds a torch.nn.RMSNorm that also works under sequence parallelism.

    Megatron's own torch norm refuses sequence parallelism; all it lacks is the mark by which the gradient of the weight
    is summed over tensor-parallel ranks.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> torch.nn.RMSNorm:  # type: ignore[misc]
        norm = torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
