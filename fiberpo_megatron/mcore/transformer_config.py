"""This module describes an architecture in a layout as Megatron's TransformerConfig."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from fiberpo_megatron.mcore.families import Architecture, LatentAttention, Rope
from fiberpo_megatron.mcore.parallel.checks import layers_per_chunk
from fiberpo_megatron.mcore.parallel.dispatcher import dispatcher_options
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.platform import activate
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig, RecomputeModule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ANGLES = 4096
"""Positions of which latent attention with the plain embedding prepares cosines and sines when it is built."""


def transformer_config(
    architecture: Architecture, model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype | None = None
) -> TransformerConfig:
    """Return Megatron's description of the model in this layout."""
    dtype = dtype or DTYPES[model.dtype]
    parallel = layout.parallel
    interleaved = parallel.virtual_pipeline > 1
    options: dict[str, Any] = dict(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.key_value_heads,
        kv_channels=architecture.head_dim,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # `draw_weights` or a checkpoint fills the parameters. Not perform_initialization = False: Megatron
        # then leaves out the tensor-parallel marks too, and ranks disagree about the gradient norm.
        init_method=_leave,
        output_layer_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_uneven_stages(architecture.layers, parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        variable_seq_lengths=True,
        # The interleaved schedule of 0.16.1 frees an output before it has waited for its send: other data may arrive,
        # without an error.
        deallocate_pipeline_outputs=parallel.pipeline > 1 and not interleaved,
        # Interleaving two stages over gloo without these is silently wrong in 0.16.1.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,  # gradients are sums: nothing divides them by ranks or micro-batches
        **dispatcher_options(parallel),
        **_recompute_options(architecture, model),
        **_expert_options(architecture, model, dtype),
        **_fp8_options(architecture, model),
        **activate().transformer_options(),
    )
    if architecture.latent:
        return MLATransformerConfig(**{**options, **_latent_options(architecture.latent, architecture.rope, options)})
    config = TransformerConfig(**options)
    if architecture.rope.kind == "yarn":
        _set_yarn(config, architecture.rope)
    return config


def _recompute_options(architecture: Architecture, model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "none":
        return {}
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    experts = architecture.experts
    grouped = experts is not None and activate().transformer_options()["moe_grouped_gemm"]
    has = {
        "mlp": experts is None or bool(experts.dense_layers),
        "moe": experts is not None,
        "moe_act": grouped,
        "shared_experts": experts is not None and experts.shared_ffn_size > 0,
        "mla_up_proj": architecture.latent is not None,
    }
    usual = "moe_act" if grouped else "moe" if experts else "mlp"
    modules = ["layernorm", usual] if model.recompute_modules is None else list(model.recompute_modules)
    absent = [module for module in modules if not has.get(module, True)]
    if absent:
        raise ValueError(
            f"model.recompute_modules names {absent}, which a {architecture.model_type} model does not have on this "
            f"machine; use some of {[m for m in get_args(RecomputeModule) if has.get(m, True)]}"
        )
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def _uneven_stages(layers: int, parallel: ParallelConfig) -> list[list[str]] | None:
    """Return what each model chunk holds, in Megatron's names; None if all get the same number of layers."""
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if layers % chunks == 0:
        return None
    stages = [["decoder"] * count for count in layers_per_chunk(layers, chunks)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _leave(weight: Tensor) -> Tensor:
    return weight


def _expert_options(architecture: Architecture, model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    experts = architecture.experts
    if experts is None:
        return {}
    sparse = [0 if layer in experts.dense_layers else 1 for layer in range(architecture.layers)]
    softmax = experts.score == "softmax"
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_layer_freq": sparse if experts.dense_layers else 1,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_size or None,
        "moe_router_topk": experts.per_token,
        "moe_router_dtype": "fp64" if dtype is torch.float64 else "fp32",
        "moe_router_score_function": experts.score,
        # softmax over the chosen experts equals the softmax over all, renormalised over the chosen
        "moe_router_pre_softmax": softmax and not experts.normalised,
        "moe_router_topk_scaling_factor": experts.scaling,
        "moe_router_num_groups": experts.groups,
        "moe_router_group_topk": experts.groups_per_token,
        "moe_router_enable_expert_bias": experts.correction_bias,
        "moe_router_bias_update_rate": model.router_bias_update_rate,
        "moe_router_load_balancing_type": "aux_loss" if model.router_aux_loss else "none",
        "moe_aux_loss_coeff": model.router_aux_loss,
    }


def _fp8_options(architecture: Architecture, model: ModelConfig) -> dict[str, Any]:
    if model.fp8 == "none":
        return {}
    return {
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe,
        # the grouped products of the experts want aligned numbers of tokens
        "moe_router_padding_for_quantization": architecture.experts is not None,
    }


def _latent_options(latent: LatentAttention, rope: Rope, options: Mapping[str, Any]) -> dict[str, Any]:
    # Megatron's fused kernel takes sizes that are powers of two, and YaRN alone; YaRN that stretches by 1 is the plain
    # embedding.
    sizes = (latent.plain_size, latent.rotary_size, latent.value_size)
    fused = options["apply_rope_fusion"] and all(size & (size - 1) == 0 for size in sizes)
    yarn = rope.kind == "yarn" or fused
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.plain_size,
        "qk_pos_emb_head_dim": latent.rotary_size,
        "v_head_dim": latent.value_size,
        "qk_layernorm": True,  # of the compressed queries, keys and values
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rope.theta,
        "rotary_scaling_factor": rope.factor,
        # Each layer keeps the angles of so many positions, and of more once a row has them.
        "original_max_position_embeddings": rope.original_positions or _ANGLES,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        # Megatron's way to say that cosines and sines alone are scaled, by the factor's own concentration
        "mscale": 1.0 if rope.mscale is None else rope.mscale,
        "mscale_all_dim": 0.0 if rope.mscale_all_dim is None else rope.mscale_all_dim,
        "apply_rope_fusion": fused,
    }


def _set_yarn(config: TransformerConfig, rope: Rope) -> None:
    """Set the attributes that GPTModel and its attention read; in 0.16 they are not fields of the config."""
    config.yarn_rotary_scaling_factor = rope.factor
    config.yarn_original_max_position_embeddings = rope.original_positions
    config.yarn_beta_fast = rope.beta_fast
    config.yarn_beta_slow = rope.beta_slow
    config.yarn_mscale = rope.mscale
    config.yarn_mscale_all_dim = rope.mscale_all_dim
    config.yarn_correction_range_round_to_int = rope.truncate
    if config.apply_rope_fusion:
        # The fused kernel leaves out YaRN's scale of cosines and sines. All elements of queries and keys are rotated,
        # so that the square of the scale belongs to every score: the softmax takes it, and the scale becomes 1.
        assert config.kv_channels is not None
        config.softmax_scale = _concentration(rope) ** 2 / math.sqrt(config.kv_channels)
        config.yarn_mscale = config.yarn_mscale_all_dim = 1.0


def _concentration(rope: Rope) -> float:
    """Return YaRN's scale of cosines and sines (arXiv 2309.00071, section 3.4)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale is None or rope.mscale_all_dim is None:
        return scale(1.0)
    return scale(rope.mscale) / scale(rope.mscale_all_dim)
