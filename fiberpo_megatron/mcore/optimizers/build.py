"""This module wraps the model for data parallelism and builds Megatron's optimizer and learning-rate schedule."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fiberpo_megatron.mcore.model import PolicyModel
from fiberpo_megatron.mcore.optimizers.adam import Adam
from fiberpo_megatron.mcore.optimizers.base import Optimizer
from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.mcore.transformer_config import DTYPES

BUCKET_ELEMENTS: int | None = None
"""Elements of a bucket of parameters whose gradients travel together where that overlaps with the backward pass. None
is Megatron's own choice: 40 million, or a million for each data-parallel rank if that is more."""
PIECE = 1 << 22
"""Elements of a gradient that are looked at together when one that is not finite is searched for."""


def wrap_data_parallel(chunks: Sequence[PolicyModel], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap every chunk for data parallelism. Gradients are summed over ranks in float32 and never averaged."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=BUCKET_ELEMENTS,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    chunks[0].config.finalize_model_grads_func = _sum_gradients
    if parallel.overlap_grad_reduce:  # until the last micro-batch, gradients are added up without being sent
        chunks[0].config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def _sum_gradients(chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None, **kwargs: Any) -> None:
    """Reduce the gradients as Megatron does, without its division by the number of tokens."""
    finalize_model_grads(chunks, None, **kwargs)


def build_optimizer(
    chunks: list[DistributedDataParallel],
    optimizer: Optimizer,
    settings: OptimizerConfig,
    *,
    dtype: str,
    distributed: bool,
    total_steps: int,
) -> tuple["OptimizerParts", OptimizerParamScheduler]:
    """Return Megatron's optimizer with float32 master weights, and the learning-rate schedule over `total_steps` steps.

    `dtype` is the parameters' type; `distributed` shards the optimizer's state over the data-parallel ranks.
    """
    built = OptimizerParts(optimizer.build(chunks, settings, dtype=dtype, distributed=distributed))
    scheduler = OptimizerParamScheduler(
        built,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=min(settings.warmup_steps, total_steps - 1),
        lr_decay_steps=total_steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
    return built, scheduler


def megatron_adam(
    chunks: list[DistributedDataParallel],
    settings: OptimizerConfig,
    adam: Adam | None = None,
    *,
    dtype: str,
    distributed: bool,
) -> MegatronOptimizer:
    """Return Megatron's Adam with decoupled weight decay and float32 master weights. `adam` has its numbers."""
    adam = adam or Adam()
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=adam.beta1,
        adam_beta2=adam.beta2,
        adam_eps=adam.eps,
        bf16=DTYPES[dtype] is torch.bfloat16,
        params_dtype=DTYPES[dtype],
        use_distributed_optimizer=distributed,
        clip_grad=settings.clip_grad or float("inf"),  # 0 would also leave the norm uncomputed
    )
    return get_megatron_optimizer(config, chunks)


class OptimizerParts(ChainedOptimizer):
    """Chains the optimizers of dense and of expert parameters, and takes a step in two halves.

    `begin_step` gives the norm of the gradient, which says whether the gradient is finite, before anything has moved;
    `step` then goes on with it.
    """

    def __init__(self, built: MegatronOptimizer) -> None:
        super().__init__(list(optimizer_parts(built)))
        self._norm: float | None = None

    def begin_step(self) -> float:
        """Return the norm of the whole gradient, the same on every rank. Every rank calls it."""
        self.prepare_grads()
        self._norm = float(super().get_grad_norm() or 0.0)
        return self._norm

    def get_grad_norm(self) -> float:
        """Return the norm that `begin_step` has found, once, or compute it."""
        norm, self._norm = self._norm, None
        return float(super().get_grad_norm() or 0.0) if norm is None else norm


def optimizer_parts(optimizer: MegatronOptimizer) -> Sequence[Any]:
    """Return the optimizers that Megatron chains: those of dense and of expert parameters."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def non_finite_gradient(chunks: Sequence[DistributedDataParallel]) -> str | None:
    """Return the name of a parameter of this rank whose gradient is not finite, or None."""
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad and not _finite(parameter.main_grad):
                return name
    return None


def _finite(gradient: torch.Tensor) -> bool:
    """Return whether all elements are finite. `isfinite` makes temporaries of 7 bytes an element: it sees a piece."""
    return all(bool(piece.isfinite().all()) for piece in gradient.view(-1).split(PIECE))
