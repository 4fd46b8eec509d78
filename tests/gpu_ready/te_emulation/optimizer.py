"""Kernels over lists of tensors, which Transformer Engine's FusedAdam and Megatron-Core's gradient norm call."""

import torch
from torch import Tensor


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensors: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Take one step of AdamW (mode 1) on [gradients, parameters, first moments, second moments] in place."""
    assert mode == 1, "only decoupled weight decay is emulated"
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    with torch.no_grad():
        for gradient, parameter, average, square in zip(*tensors, strict=True):
            gradient = gradient.to(average.dtype)
            average.mul_(beta1).add_(gradient, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            update = (average / first) / ((square / second).sqrt() + epsilon) + weight_decay * parameter
            parameter.sub_(lr * update)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    """Write the first list times the scale into the second."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensors: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the norm [1] over all tensors, and an empty tensor in place of the norms of each."""
    assert not per_tensor
    squares = [tensor.float().square().sum() for tensor in tensors[0]]
    return torch.stack(squares).sum().sqrt().view(1), torch.empty(0)


KERNELS = {one.__name__: one for one in (multi_tensor_adam, multi_tensor_scale, multi_tensor_l2norm)}
"""The kernels by their names in the extension."""
