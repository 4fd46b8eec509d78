"""The Megatron-Core model of an architecture, and its deterministic random weights."""

import hashlib
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fiberpo_megatron.config.schema import ModelConfig, RecomputeModule
from fiberpo_megatron.mcore.architecture import Architecture
from fiberpo_megatron.mcore.global_tensors import global_shards
from fiberpo_megatron.mcore.layout import ParallelLayout
from fiberpo_megatron.mcore.platform import activate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(GPTModel):
    """A GPTModel whose last stage answers with hidden states.

    Logits are made later, for response positions only and in chunks (`log_probs.py`).
    """

    output_rows: int
    """Rows of every rank's output layer, padding included."""
    vocab_rows: int
    """Rows of this rank's output layer that stand for tokens; the rest pads the vocabulary."""

    def _preprocess(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
        prepared = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        packed = kwargs.get("packed_seq_params")
        if packed is None or packed.qkv_format != "sbhd":
            return prepared
        # The row holds several sequences as one: look the rotary angles up by position inside the sequence.
        angles = self.rotary_pos_emb.get_emb(packed.max_seqlen_q)  # [longest, 1, 1, d]
        return (prepared[0], angles.index_select(0, position_ids.view(-1)), *prepared[2:])

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """[vocabulary / tensor, hidden] rows of the output layer that stand for tokens."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight[: self.vocab_rows]


def transformer_config(
    architecture: Architecture, model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype | None = None
) -> TransformerConfig:
    """Megatron's description of the model in this layout."""
    dtype = dtype or DTYPES[model.dtype]
    parallel = layout.parallel
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
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
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, in dense models too
        deallocate_pipeline_outputs=parallel.pipeline > 1,
        # Interleaving two stages over gloo without these is silently wrong in 0.16.1.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,  # gradients are sums: nothing divides them by ranks or micro-batches
        **_recompute_options(architecture, model),
        **_expert_options(architecture, model, dtype),
        **activate().transformer_options(),
    )


def _recompute_options(architecture: Architecture, model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "none":
        return {}
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    experts = architecture.experts is not None
    grouped = experts and activate().transformer_options()["moe_grouped_gemm"]
    has = {"mlp": not experts, "moe": experts, "moe_act": grouped, "shared_experts": False, "mla_up_proj": False}
    usual = "moe_act" if grouped else "moe" if experts else "mlp"
    modules = ["layernorm", usual] if model.recompute_modules is None else list(model.recompute_modules)
    absent = [module for module in modules if not has.get(module, True)]
    if absent:
        raise ValueError(
            f"model.recompute_modules names {absent}, which a {architecture.model_type} model does not have on this "
            f"machine; use some of {[m for m in get_args(RecomputeModule) if has.get(m, True)]}"
        )
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def _leave(weight: Tensor) -> Tensor:
    return weight


def _expert_options(architecture: Architecture, model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    if architecture.experts is None:
        return {}
    return {
        "num_moe_experts": architecture.experts,
        "moe_ffn_hidden_size": architecture.ffn_size,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_dtype": "fp64" if dtype is torch.float64 else "fp32",
        # softmax over the chosen experts equals the softmax over all, renormalised over the chosen
        "moe_router_pre_softmax": not architecture.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss" if model.router_aux_loss else "none",
        "moe_aux_loss_coeff": model.router_aux_loss,
    }


def build_model(
    architecture: Architecture, model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype | None = None
) -> list[PolicyModel]:
    """This process's model chunks, parameters not yet filled.

    Routers are frozen unless `model.train_router`; every expert parameter is marked `allreduce = False`, so that
    its gradient is summed over the expert-data-parallel group in every layout (Megatron marks it only when
    expert > 1, and is then wrong where expert_tensor differs from tensor).
    """
    _refuse_aux_loss(model, layout)
    config = transformer_config(architecture, model, layout, dtype)
    chunks = []
    for index in range(layout.chunks):
        chunk = _build_chunk(architecture, config, layout, index)
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False
            if ".router." in name and not model.train_router:
                parameter.requires_grad_(False)
        chunks.append(chunk.to(layout.device))
    return chunks


def _build_chunk(
    architecture: Architecture, config: TransformerConfig, layout: ParallelLayout, index: int
) -> PolicyModel:
    platform = activate()
    virtual = index if layout.chunks > 1 else None
    layer = platform.layer_spec(num_experts=architecture.experts, qk_layernorm=architecture.qk_norm)
    layers = get_num_layers_to_build(config, vp_stage=virtual, pp_rank=layout.pipeline_rank)
    per_rank = -(-architecture.vocab_size // layout.tensor_size)
    chunk = PolicyModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * layers, layer_norm=platform.final_norm()
        ),
        vocab_size=per_rank * layout.tensor_size,
        max_sequence_length=architecture.max_positions,
        pre_process=layout.pipeline_rank == 0 and index == 0,
        post_process=layout.is_last_stage and index == layout.chunks - 1,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        vp_stage=virtual,
    )
    chunk.output_rows = per_rank
    chunk.vocab_rows = min(per_rank, architecture.vocab_size - layout.tensor_rank * per_rank)
    return chunk


def _refuse_aux_loss(model: ModelConfig, layout: ParallelLayout) -> None:
    if model.router_aux_loss and layout.tensor_size * layout.context_size > 1:
        raise ValueError(
            f"model.router_aux_loss = {model.router_aux_loss} gives wrong gradients under tensor or context "
            f"parallelism (tensor {layout.tensor_size}, context {layout.context_size}) in Megatron-Core 0.16; set it "
            "to 0, or parallel.tensor and parallel.context to 1"
        )


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
