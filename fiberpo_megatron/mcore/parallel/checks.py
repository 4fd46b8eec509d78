"""This module checks whether a parallel layout fits a model; every message says what does not divide and what would.

Its functions are pure. Context parallelism has no rule: sequences are padded to what it needs
(`layout.sequence_multiple`). Neither has the number of micro-batches: packing makes it the same on every rank and a
multiple of what an interleaved pipeline needs.
"""

from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any

from fiberpo_megatron.mcore.families import Architecture, read_architecture
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig


def check_layout(hf_config: Mapping[str, Any], parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that does not fit the model or the world. Raises ValueError with the values that would."""
    problems = layout_problems(read_architecture(hf_config), parallel, world_size)
    if problems:
        raise ValueError("\n".join(problems))


def layout_problems(architecture: Architecture, parallel: ParallelConfig, world_size: int) -> list[str]:
    """Return everything that keeps the layout from running, one sentence each; the list is empty when the layout
    fits."""
    return [
        *_world_problems(parallel, world_size),
        *_tensor_problems(architecture, parallel),
        *_layer_problems(architecture, parallel),
        *_expert_problems(architecture, parallel, world_size),
    ]


def check_routers(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse ways of balancing the routers' load that would be wrong or do nothing. Raises ValueError with what to
    set."""
    experts = architecture.experts
    if model.router_bias_update_rate and (experts is None or not experts.correction_bias):
        raise ValueError(
            f"model.router_bias_update_rate = {model.router_bias_update_rate}, but this {architecture.model_type} "
            "model has no correction bias; set it to 0"
        )
    if model.router_aux_loss and parallel.tensor * parallel.context > 1:
        raise ValueError(
            f"model.router_aux_loss = {model.router_aux_loss} gives wrong gradients under tensor or context "
            f"parallelism (tensor {parallel.tensor}, context {parallel.context}) in Megatron-Core 0.16; set it to 0, "
            "or parallel.tensor and parallel.context to 1"
        )


def layers_per_chunk(layers: int, chunks: int) -> list[int]:
    """Return the number of layers of each model chunk along the pipeline, as equal as possible.

    Chunks in the middle get the layers that are left over: the first also holds the embedding, the last the output.
    """
    base, more = divmod(layers, chunks)
    first = (chunks - more) // 2
    return [base + (first <= chunk < first + more) for chunk in range(chunks)]


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _world_problems(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    product = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    if world_size % parallel.model_ranks:
        yield (
            f"{world_size} processes were started, but one replica takes {parallel.model_ranks} ({product}); "
            f"start a multiple of {parallel.model_ranks} processes"
        )
        return
    data = world_size // parallel.model_ranks
    if parallel.data is not None and parallel.data != data:
        yield (
            f"parallel.data = {parallel.data}, but {world_size} processes over {product} make {data}; start "
            f"{parallel.model_ranks * parallel.data} processes, or set parallel.data = {data}"
        )


def _tensor_problems(architecture: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    size = parallel.tensor
    split = {
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.key_value_heads,
        **_split_widths(architecture),
    }
    for what, number in split.items():
        if number % size:
            fits = divisors(gcd(*split.values()))
            yield f"parallel.tensor = {size} does not divide {what} = {number}; use one of {fits}"
            return
    padded = -(-architecture.vocab_size // size)
    if (size - 1) * padded >= architecture.vocab_size:
        yield (
            f"parallel.tensor = {size} leaves a rank without any of vocab_size = {architecture.vocab_size} tokens; "
            "use fewer tensor-parallel ranks"
        )


def _split_widths(architecture: Architecture) -> dict[str, int]:
    """Return the inner sizes of the MLPs that tensor parallelism splits."""
    experts = architecture.experts
    widths = {}
    if experts is None or experts.dense_layers:
        widths["intermediate_size"] = architecture.ffn_size
    if experts and experts.shared_ffn_size:
        widths["the shared experts' intermediate size"] = experts.shared_ffn_size
    return widths


def _layer_problems(architecture: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    layers, stages, virtual = architecture.layers, parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and stages == 1:
        yield (
            f"parallel.virtual_pipeline = {virtual} interleaves pipeline stages, but parallel.pipeline = 1; set "
            "virtual_pipeline = 1 or pipeline to at least 2"
        )
    elif stages * virtual > layers:
        yield (
            f"parallel.pipeline x parallel.virtual_pipeline = {stages} x {virtual} needs a layer for each chunk, but "
            f"num_hidden_layers = {layers}; make the product {layers} or less"
        )
    elif layers % (stages * virtual) and not parallel.uneven_stages:
        key, value, what, number = (
            ("pipeline", stages, "num_hidden_layers", layers)
            if layers % stages
            else ("virtual_pipeline", virtual, "layers per stage", layers // stages)
        )
        yield (
            f"parallel.{key} = {value} does not divide {what} = {number}; use one of {divisors(number)}, or set "
            f"parallel.uneven_stages = true for chunks of {layers_per_chunk(layers, stages * virtual)} layers"
        )


def _expert_problems(architecture: Architecture, parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    experts, expert, split = architecture.experts, parallel.expert, parallel.expert_tensor
    if experts is None:
        if expert > 1 or split > 1:
            yield (
                f"parallel.expert = {expert}, parallel.expert_tensor = {split}: a {architecture.model_type} model has "
                "no experts; set both to 1"
            )
        return
    if experts.count % expert:
        fits = divisors(experts.count)
        yield f"parallel.expert = {expert} does not divide the number of experts = {experts.count}; use one of {fits}"
    if experts.ffn_size % split:
        yield (
            f"parallel.expert_tensor = {split} does not divide the experts' intermediate size = {experts.ffn_size}; "
            f"use one of {divisors(experts.ffn_size)}"
        )
    ranks, left = divmod(world_size, parallel.pipeline)
    if not left and ranks % (expert * split):
        yield (
            f"parallel.expert x parallel.expert_tensor = {expert} x {split} does not divide tensor x context x data = "
            f"{ranks}; their product must be one of {divisors(ranks)}"
        )
