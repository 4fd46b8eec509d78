"""Optimizers as a user of the package writes them: each is one class that a config names by its import path."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.mcore.optimizers import TorchOptimizer


class Momentum(TorchOptimizer):
    """Gradient descent with momentum whose start is corrected as Adam's is, and decoupled weight decay."""

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay = {decay} must be at least 0 and less than 1")
        self.decay = decay

    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return _Momentum(groups, self.decay)

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"velocity": torch.zeros_like(parameter), "step": torch.tensor(0.0)}


class _Momentum(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], decay: float) -> None:
        super().__init__(groups, {"decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"velocity": torch.zeros_like(parameter), "step": torch.tensor(0.0)}
                state["step"] += 1
                state["velocity"].lerp_(parameter.grad, 1 - group["decay"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                corrected = state["velocity"] / (1 - group["decay"] ** float(state["step"]))
                parameter.add_(corrected, alpha=-group["lr"])


class Muon(TorchOptimizer):
    """Momentum that is made orthogonal for matrices (Jordan et al., 2024), and signed for all other parameters."""

    whole_matrices = True

    def __init__(self, momentum: float = 0.95, iterations: int = 5) -> None:
        self.momentum, self.iterations = momentum, iterations

    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return _Muon(groups, self.momentum, self.iterations)

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameter)}


class _Muon(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], momentum: float, iterations: int) -> None:
        super().__init__(groups, {"momentum": momentum, "iterations": iterations})
        self.matrices = 0
        """Matrices that the last step saw."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.matrices = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(group["momentum"]).add_(parameter.grad)
                matrix = parameter.dim() == 2
                self.matrices += matrix
                update = orthogonal(momentum, group["iterations"]) if matrix else momentum.sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """Return about U V^T of the singular value decomposition U S V^T, by Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T
