"""This module adds the gradient of a weight to its main gradient: the buffer in float32 that data-parallel ranks sum.

Megatron's linear layers do so in their backward passes where `gradient_accumulation_fusion` is on, with a kernel of
apex or of Transformer Engine. The output layer is not called as a layer (`log_probs.py`), hence it does so here.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

SLICE_BYTES = 64 * 2**20
"""Bytes of the temporary that a product in another type than its sum's takes, where apex is not installed."""


@dataclass(frozen=True)
class MainGradient:
    """Says where the gradient of a weight is added up."""

    parameter: Tensor
    """A parameter that is wrapped for data parallelism, and so has a `main_grad`."""
    rows: int
    """The first rows of the parameter take part; the rest pads the vocabulary and has no gradient."""
    only_use: bool
    """Whether no other operation of the model uses the parameter, so that autograd brings no gradient for it."""

    @property
    def buffer(self) -> Tensor:
        """Return the main gradient [rows, h]."""
        gradient: Tensor = self.parameter.main_grad[: self.rows]  # type: ignore[attr-defined]
        return gradient

    def mark_added(self) -> None:
        """Tell Megatron that the gradient has been added.

        Its hook runs although autograd brings no gradient, and insists on one where reductions overlap with the
        backward pass. It gets a tensor of one element in the parameter's shape, which it drops unread.
        """
        if self.only_use:
            self.parameter.grad = self.parameter.new_zeros(()).expand_as(self.parameter)
            self.parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total` [v, h], of left [c, v] and right [c, h].

    Where `total` has another type, the product is computed in that of the factors, as in Megatron's linear layers: by
    apex where it is installed, which adds inside the product, and else in slices.
    """
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
        return
    kernel = fused_kernel()
    if kernel is not None and total.is_cuda:
        kernel.wgrad_gemm_accum_fp32(right, left, total)
        return
    size = max(1, SLICE_BYTES // (right.size(1) * right.element_size()))
    for start in range(0, len(total), size):
        total[start : start + size] += left[:, start : start + size].t() @ right


@cache
def fused_kernel() -> Any:
    """Return apex's module of fused weight gradients, or None if apex is not installed."""
    try:
        return importlib.import_module("fused_weight_gradient_mlp_cuda")
    except ImportError:
        return None
