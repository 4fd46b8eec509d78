"""Objectives with one defect each, which a certificate must find."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.fibration import GRPO, FiberPO, ObjectiveOutput


@dataclass(frozen=True)
class OneBit(GRPO):
    """Changes the last bit of one coefficient where the tokens are cut over ranks."""

    def __call__(self, *tensors: Tensor, reduce: Any = None, **call: Any) -> ObjectiveOutput:
        out = super().__call__(*tensors, reduce=reduce, **call)
        if reduce is not None and len(out.gradient):
            at = int(out.gradient.abs().argmax())
            out.gradient.view(torch.int32 if out.gradient.dtype == torch.float32 else torch.int64)[at] ^= 1
        return out


@dataclass(frozen=True)
class Float32Reduction(FiberPO):
    """Sums over ranks in float32."""

    def __call__(self, *tensors: Tensor, reduce: Any = None, **call: Any) -> ObjectiveOutput:
        def rounded(sums: Tensor) -> Tensor:
            total: Tensor = reduce(sums.float().double())
            return total.float().double()

        return super().__call__(*tensors, reduce=None if reduce is None else rounded, **call)


@dataclass(frozen=True)
class MeanPerMicroBatch(GRPO):
    """Normalises the weights of each call, as a mean over a micro-batch does."""

    def __call__(self, log_ratio: Tensor, advantages: Tensor, weights: Tensor, **call: Any) -> ObjectiveOutput:
        return super().__call__(log_ratio, advantages, weights / weights.sum().clamp(min=1e-30), **call)


@dataclass(frozen=True)
class OrderDependent(GRPO):
    """Adds to each coefficient what depends on the tokens before it."""

    def __call__(self, *tensors: Tensor, **call: Any) -> ObjectiveOutput:
        out = super().__call__(*tensors, **call)
        return replace(out, gradient=out.gradient + 1e-9 * torch.cumsum(tensors[0], 0).to(out.gradient.dtype))


@dataclass(frozen=True)
class RaisesInACut(GRPO):
    """Fails on a rank without tokens."""

    def __call__(self, *tensors: Tensor, **call: Any) -> ObjectiveOutput:
        if not len(tensors[0]):
            raise RuntimeError("there are no tokens here")
        return super().__call__(*tensors, **call)
