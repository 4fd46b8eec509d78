"""Whether a parallel layout fits a model. Pure; every message says what does not divide and what would."""

from collections.abc import Mapping
from typing import Any

from fiberpo_megatron.config.schema import ParallelConfig
from fiberpo_megatron.mcore.architecture import Architecture, Experts, read_architecture


def check_layout(hf_config: Mapping[str, Any], parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that does not divide the model or the world; ValueError with the values that would."""
    architecture = read_architecture(hf_config)
    _check_world(parallel, world_size)
    _check_tensor(architecture, parallel)
    _check_layers(architecture, parallel)
    if architecture.experts is None:
        if parallel.expert > 1 or parallel.expert_tensor > 1:
            raise ValueError(
                f"parallel.expert = {parallel.expert}, parallel.expert_tensor = {parallel.expert_tensor}: "
                f"a {architecture.model_type} model has no experts; set both to 1"
            )
    else:
        _check_experts(architecture.experts, parallel, world_size)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _refuse(key: str, value: int, what: str, number: int, allowed: list[int]) -> None:
    raise ValueError(f"parallel.{key} = {value} does not divide {what} = {number}; use one of {allowed}")


def _check_world(parallel: ParallelConfig, world_size: int) -> None:
    product = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    if world_size % parallel.model_ranks:
        raise ValueError(
            f"{world_size} processes were started, but one replica takes {parallel.model_ranks} ({product}); "
            f"start a multiple of {parallel.model_ranks} processes"
        )
    data = world_size // parallel.model_ranks
    if parallel.data is not None and parallel.data != data:
        raise ValueError(
            f"parallel.data = {parallel.data}, but {world_size} processes over {product} make {data}; start "
            f"{parallel.model_ranks * parallel.data} processes, or set parallel.data = {data}"
        )


def _check_tensor(architecture: Architecture, parallel: ParallelConfig) -> None:
    size = parallel.tensor
    for what, number in (
        ("num_attention_heads", architecture.heads),
        ("num_key_value_heads", architecture.key_value_heads),
        *_split_widths(architecture),
    ):
        if number % size:
            _refuse("tensor", size, what, number, divisors(number))
    padded = -(-architecture.vocab_size // size)
    if (size - 1) * padded >= architecture.vocab_size:
        raise ValueError(
            f"parallel.tensor = {size} leaves a rank without any of vocab_size = {architecture.vocab_size} tokens; "
            "use fewer tensor-parallel ranks"
        )


def _split_widths(architecture: Architecture) -> list[tuple[str, int]]:
    """Inner sizes of the MLPs that tensor parallelism splits."""
    experts = architecture.experts
    widths = []
    if experts is None or experts.dense_layers:
        widths.append(("intermediate_size", architecture.ffn_size))
    if experts and experts.shared_ffn_size:
        widths.append(("the shared experts' intermediate size", experts.shared_ffn_size))
    return widths


def _check_layers(architecture: Architecture, parallel: ParallelConfig) -> None:
    if architecture.layers % parallel.pipeline:
        _refuse(
            "pipeline",
            parallel.pipeline,
            "num_hidden_layers",
            architecture.layers,
            divisors(architecture.layers),
        )
    if parallel.virtual_pipeline == 1:
        return
    if parallel.pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} interleaves pipeline stages, but "
            "parallel.pipeline = 1; set virtual_pipeline = 1 or pipeline to at least 2"
        )
    per_stage = architecture.layers // parallel.pipeline
    if per_stage % parallel.virtual_pipeline:
        _refuse("virtual_pipeline", parallel.virtual_pipeline, "layers per stage", per_stage, divisors(per_stage))


def _check_experts(experts: Experts, parallel: ParallelConfig, world_size: int) -> None:
    if experts.count % parallel.expert:
        _refuse("expert", parallel.expert, "the number of experts", experts.count, divisors(experts.count))
    if experts.ffn_size % parallel.expert_tensor:
        fits = divisors(experts.ffn_size)
        _refuse(
            "expert_tensor",
            parallel.expert_tensor,
            "the experts' intermediate size",
            experts.ffn_size,
            fits,
        )
    ranks = world_size // parallel.pipeline
    if ranks % (parallel.expert * parallel.expert_tensor):
        raise ValueError(
            f"parallel.expert x parallel.expert_tensor = {parallel.expert} x {parallel.expert_tensor} does not divide "
            f"tensor x context x data = {ranks}; their product must be one of {divisors(ranks)}"
        )
