"""This module proposes layouts for a number of GPUs, the fastest that fits first."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import Architecture, read_architecture
from fiberpo_megatron.mcore.parallel.checks import layout_problems
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.engines import plan_engine
from fiberpo_megatron.planning.estimate import Plan, make_plan
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.parameters import expert_parameters, model_parameters
from fiberpo_megatron.planning.states import DTYPE_BYTES, GRADIENT_BYTES

_SIZES = (1, 2, 4, 8, 16)
_TENSOR = (1, 2, 4, 8)
"""Tensor parallelism beyond a node is not proposed."""
_ENGINE_SHARES = (0.25, 0.5, 0.75)


def propose(
    config: Config,
    hf_config: Mapping[str, Any],
    gpus: int,
    memory: float,
    gpu: Gpu,
    assumptions: Assumptions,
    count: int = 10,
) -> list[Plan]:
    """Return at most `count` plans that fit, ordered by estimated step time.

    Layout, engines and recomputation vary; the rest of the config stays. Engines get separate GPUs.
    """
    fitting = []
    for candidate in _candidates(config, hf_config, gpus, memory):
        plan = make_plan(candidate, hf_config, gpus, memory, gpu, assumptions)
        if not plan.problems:
            fitting.append(plan)
    return sorted(fitting, key=lambda plan: (plan.time.total, plan.largest.total))[:count]


def _candidates(config: Config, hf_config: Mapping[str, Any], gpus: int, memory: float) -> Iterator[Config]:
    architecture = read_architecture(hf_config)
    for share, tensor in product(_ENGINE_SHARES, _TENSOR):
        engines = int(gpus * share) // tensor
        if not engines:
            continue
        engine = config.rollout.engine.model_copy(
            update={"urls": [], "count": engines, "tensor": tensor, "colocated": False}
        )
        rollout = config.rollout.model_copy(update={"engine": engine})
        slurm = config.slurm.model_copy(update={"engine_nodes": 1})  # `count` are all engines
        if not plan_engine(config.model_copy(update={"rollout": rollout}), architecture, memory).fits:
            continue
        for parallel in _layouts(config, hf_config, gpus - engines * tensor, memory):
            for recompute in ("none", "full"):
                model = config.model.model_copy(update={"recompute": recompute})
                yield config.model_copy(
                    update={"model": model, "parallel": parallel, "rollout": rollout, "slurm": slurm}
                )


def _layouts(config: Config, hf_config: Mapping[str, Any], gpus: int, memory: float) -> Iterator[ParallelConfig]:
    architecture = read_architecture(hf_config)
    for tensor, pipeline, context in product(_TENSOR, _SIZES, _SIZES):
        if gpus % (tensor * pipeline * context):
            continue
        for expert, expert_tensor in product((*_SIZES, 32, 64), sorted({1, tensor})):
            sizes = {
                "tensor": tensor,
                "pipeline": pipeline,
                "context": context,
                "expert": expert,
                "expert_tensor": expert_tensor,
                "virtual_pipeline": 1,
                "data": gpus // (tensor * pipeline * context),
            }
            parallel = config.parallel.model_copy(update=sizes)
            if layout_problems(architecture, parallel, gpus):
                continue
            if _least_bytes(architecture, config.model.dtype, parallel) < memory:
                yield parallel


def _least_bytes(architecture: Architecture, dtype: str, parallel: ParallelConfig) -> float:
    """Return the bytes of parameters and gradients in an even share of the model: a cheap bound before the exact
    count."""
    chosen = expert_parameters(architecture)
    rest = model_parameters(architecture) - chosen
    share = chosen / (parallel.expert * parallel.expert_tensor) + rest / parallel.tensor
    return share / parallel.pipeline * (DTYPE_BYTES[dtype] + GRADIENT_BYTES)
