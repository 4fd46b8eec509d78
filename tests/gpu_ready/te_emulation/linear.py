"""Norms and linear layers of Transformer Engine, with tensor and sequence parallelism over any backend."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def gather_first(x: Tensor, group: Any) -> Tensor:
    """Return the ranks' parts of dimension 0, joined."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _reduced(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def own_part(x: Tensor, group: Any) -> Tensor:
    """Return this rank's part of dimension 0 of the sum over ranks."""
    assert x.size(0) % group.size() == 0, f"{x.size(0)} rows do not divide over {group.size()} ranks"
    return _reduced(x, group).chunk(group.size())[group.rank()].clone()


class Gather(torch.autograd.Function):
    """Joins the ranks' parts of dimension 0; the gradient is summed over ranks and cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gather_first(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return own_part(gradients[0], ctx.group), None


class ReduceScatter(torch.autograd.Function):
    """Sums over ranks and keeps this rank's part of dimension 0; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return own_part(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gather_first(gradients[0], ctx.group), None


class _SumGradient(torch.autograd.Function):
    """Leaves the input as it is; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _reduced(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """Sums over ranks; every rank has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _normalised(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """Return the norm, whose statistics Transformer Engine takes in float32."""
    wide = x.float() if x.dtype is not torch.float64 else x
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    gamma = weight.to(wide.dtype) + (1 if zero_centered else 0)
    return (wide * scale * gamma).to(x.dtype)


def rms_norm(self: Any, x: Tensor) -> Tensor:
    """Return `te.RMSNorm` of x."""
    if x.size(-1) != self.weight.numel():
        raise ValueError(f"Input tensor (shape={tuple(x.shape)}) and weight tensor are not compatible")
    return _normalised(x, self.weight, self.eps, self.zero_centered_gamma)


def _product(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """Return the output of a linear layer with its communication, and the bias where the caller adds it."""
    parallel = self.parallel_mode if self.tp_size > 1 else None
    if parallel == "column":
        x = Gather.apply(x, self.tp_group) if self.sequence_parallel else _SumGradient.apply(x, self.tp_group)
    out = F.linear(x, weight)
    if parallel == "row":
        out = (ReduceScatter if self.sequence_parallel else _Sum).apply(out, self.tp_group)
    if bias is not None and not self.return_bias:
        out = out + bias
    return (out, bias) if self.return_bias else out


def _take(self: Any, inp: Tensor) -> None:
    """Refuse an input of another type than the parameters, as every layer does before its kernel."""
    vars(self).setdefault("allow_different_data_and_param_types", False)
    self.set_activation_dtype(inp)


def _bias(self: Any) -> Tensor | None:
    return self.bias if self.use_bias else None


def linear(self: Any, inp: Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Any:
    """Return `te.Linear` of the input: column-parallel, row-parallel or neither."""
    assert inp.size(-1) == self.weight.size(1), "GEMM not possible"
    _take(self, inp)
    return _product(self, inp, self.weight, _bias(self))


def layer_norm_linear(self: Any, inp: Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Any:
    """Return `te.LayerNormLinear`: the norm of this rank's rows, then the linear layer."""
    assert self.normalization == "RMSNorm", "only the norm that the project uses is emulated"
    assert not self.return_layernorm_output
    _take(self, inp)
    normed = _normalised(inp, self.layer_norm_weight, self.eps, self.zero_centered_gamma)
    return _product(self, normed, self.weight, _bias(self))


def grouped_linear(self: Any, inp: Tensor, m_splits: Any, is_first_microbatch: bool | None = None, **_: Any) -> Tensor:
    """Return `te.GroupedLinear`: rows [sum(m_splits), in] in the order of the experts, each through its own weight."""
    splits = [int(count) for count in m_splits]
    assert len(splits) == self.num_gemms, "Number of splits should match number of GEMMs."
    assert not self.use_bias and self.parallel_mode is None or self.tp_size == 1
    rows = inp.reshape(-1, inp.size(-1))
    assert sum(splits) == rows.size(0), f"m_splits add up to {sum(splits)}, the input has {rows.size(0)} rows"
    _take(self, inp)
    parts = rows.split(splits)
    outs = [F.linear(part, getattr(self, f"weight{index}")) for index, part in enumerate(parts)]
    return torch.cat(outs).view(*inp.shape[:-1], -1)
