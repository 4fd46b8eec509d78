"""This module builds the Megatron-Core model of an architecture, and draws its deterministic random weights."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from fiberpo_megatron.mcore.families import Architecture, Rope
from fiberpo_megatron.mcore.parallel.checks import check_routers
from fiberpo_megatron.mcore.parallel.dispatcher import check_dispatcher
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.platform import activate
from fiberpo_megatron.mcore.router import Router
from fiberpo_megatron.mcore.settings import ModelConfig
from fiberpo_megatron.mcore.transformer_config import transformer_config
from fiberpo_megatron.mcore.versions import set_router
from fiberpo_megatron.mcore.weights.global_tensors import global_shards

_LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms inside latent attention, whatever `rms_norm_eps` says, as in transformers'
DeepseekV3Attention."""


class PolicyModel(GPTModel):
    """This is a GPTModel whose last stage returns hidden states.

    Logits are computed later, for response positions only and in chunks (`log_probs.py`).
    """

    output_rows: int
    """Rows of every rank's output layer, padding included."""
    vocab_rows: int
    """Rows of this rank's output layer that belong to tokens; the rest pads the vocabulary."""

    def _preprocess(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
        prepared = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        packed = kwargs.get("packed_seq_params")
        if packed is None or packed.qkv_format != "sbhd" or self.config.multi_latent_attention:
            return prepared
        # The row holds several sequences as one: look the rotary angles up by position inside the sequence.
        angles = self.rotary_pos_emb.get_emb(packed.max_seqlen_q)  # [longest, 1, 1, d]
        if self.position_embedding_type == "yarn":
            angles, _ = angles
        return (prepared[0], angles.index_select(0, position_ids.view(-1)), *prepared[2:])

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    def output_parameter(self) -> Tensor:
        """Return the [output_rows, hidden] parameter of the output layer, the rows that pad the vocabulary included."""
        tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight


def build_model(
    architecture: Architecture, model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype | None = None
) -> list[PolicyModel]:
    """Build this process's model chunks; their parameters are not yet filled.

    Routers are frozen unless `model.train_router`. Every expert parameter is marked `allreduce = False`, so that its
    gradient is summed over the expert-data-parallel group in every layout (Megatron marks it only when expert > 1,
    which is wrong when expert_tensor differs from tensor). The norm of the gradient counts what is marked as cut over
    ranks on each of them, and everything else on the first alone. Transformer Engine leaves the mark out of grouped
    experts, of which each rank then has another norm, and gives it to the down projections of latent attention, which
    every tensor-parallel rank holds whole: `_mark_cuts` puts that right.
    """
    check_routers(architecture, model, layout.parallel)
    check_dispatcher(architecture, layout.parallel)
    config = transformer_config(architecture, model, layout, dtype)
    chunks = []
    for index in range(layout.chunks):
        chunk = _build_chunk(architecture, config, layout, index)
        for name, parameter in chunk.named_parameters():
            _mark_cuts(name, parameter)
            if ".experts." in name:
                parameter.allreduce = False
            if ".router." in name and not model.train_router:
                parameter.requires_grad_(False)
        chunks.append(chunk.to(layout.device))
    return chunks


def _mark_cuts(name: str, parameter: Any) -> None:
    if ".experts." in name:
        parameter.tensor_model_parallel = True
    elif ".linear_q_down_proj." in name or ".linear_kv_down_proj." in name:
        parameter.tensor_model_parallel = False


def _build_chunk(
    architecture: Architecture, config: TransformerConfig, layout: ParallelLayout, index: int
) -> PolicyModel:
    platform = activate()
    virtual = index if layout.chunks > 1 else None
    first = get_transformer_layer_offset(config, vp_stage=virtual, pp_rank=layout.pipeline_rank)
    count = get_num_layers_to_build(config, vp_stage=virtual, pp_rank=layout.pipeline_rank)
    per_rank = -(-architecture.vocab_size // layout.tensor_size)
    chunk = PolicyModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[_layer_spec(architecture, layer) for layer in range(first, first + count)],
            layer_norm=platform.final_norm(),
        ),
        vocab_size=per_rank * layout.tensor_size,
        max_sequence_length=architecture.max_positions,
        pre_process=layout.pipeline_rank == 0 and index == 0,
        post_process=layout.is_last_stage and index == layout.chunks - 1,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        vp_stage=virtual,
        **_rotary_options(architecture.rope, latent=architecture.latent is not None),
    )
    _set_latent_norms(chunk)
    chunk.output_rows = per_rank
    chunk.vocab_rows = min(per_rank, architecture.vocab_size - layout.tensor_rank * per_rank)
    return chunk


def _set_latent_norms(chunk: PolicyModel) -> None:
    """Set the epsilon of the norms inside latent attention; Transformer Engine fuses them into linear layers."""
    for module in chunk.modules():
        if isinstance(module, MLASelfAttention):
            for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                part: Any = getattr(module, name, None)
                if hasattr(part, "eps"):
                    part.eps = _LATENT_NORM_EPS


def _layer_spec(architecture: Architecture, layer: int) -> Any:
    experts = architecture.experts
    routed = experts is not None and layer not in experts.dense_layers
    spec = activate().layer_spec(
        num_experts=experts.count if experts is not None and routed else None,
        qk_layernorm=architecture.qk_norm,
        latent=architecture.latent is not None,
    )
    if routed:
        set_router(spec, Router)
    return spec


def _rotary_options(rope: Rope, *, latent: bool) -> dict[str, Any]:
    """Return GPTModel's arguments; latent attention makes its own embedding, from the TransformerConfig."""
    options: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": rope.theta}
    if latent:
        return options
    if rope.kind == "linear":
        options["seq_len_interpolation_factor"] = rope.factor
    elif rope.kind == "llama3":
        options |= {"rope_scaling": True, "rope_scaling_factor": rope.factor}
    elif rope.kind == "yarn":
        options["position_embedding_type"] = "yarn"
    return options


def draw_weights(chunks: Sequence[PolicyModel], architecture: Architecture, seed: int) -> None:
    """Fill the parameters as Hugging Face initialises them, the same model in any layout.

    Matrices are normal with `initializer_range`, norms one, biases zero. Each layer's (expert's) global tensor is
    drawn from a generator seeded by (seed, its checkpoint key, layer, expert) and then cut.
    """
    for shard in global_shards(chunks):
        split = shard.prepend_axis_num
        at = shard.global_offset[:split]
        shape = list(shard.global_shape[split:])
        if len(shape) < 2:
            value = torch.full(shape, 0.0 if shard.key.endswith("bias") else 1.0)
        else:
            if "embedding" in shard.key or "output_layer" in shard.key:
                shape[0] = architecture.vocab_size
            digest = hashlib.sha256(f"{seed}/{shard.key}/{at}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            value = torch.randn(shape, generator=generator) * architecture.initializer_range
        _cut(shard, value)


@torch.no_grad()
def _cut(shard: ShardedTensor, value: Tensor) -> None:
    """Copy this rank's part of a global tensor into the parameter; rows beyond the vocabulary become zero."""
    split = shard.prepend_axis_num
    target = shard.data.view(shard.data.shape[-value.ndim :])
    offset = shard.global_offset[split:]
    part = value[tuple(slice(start, start + size) for start, size in zip(offset, target.shape))]
    target.zero_()
    target[tuple(slice(0, size) for size in part.shape)] = part.to(target)
