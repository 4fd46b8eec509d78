"""Which fields of config.json each family understands: one declarative table per model_type. Pure.

Defaults are those of transformers' config classes, because a config.json may leave a field out when it has the
default. A test compares the tables with transformers, so that a new field there is noticed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED = object()
"""Default of a field that has to be there."""


@dataclass(frozen=True)
class Fields:
    """What one family's config may say."""

    used: Mapping[str, Any]
    """Fields that shape the model, each with the default that a missing field stands for."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Fields with an effect that is not built, and the values at which they have none; the first is the default."""
    harmless: frozenset[str] = frozenset()
    """Fields of this family alone that do not change the computation."""


HARMLESS = frozenset({
    "transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype",
    "torch_dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "pretraining_tp",
    "output_router_logits", "router_aux_loss_coef", "max_window_layers", "auto_map", "_attn_implementation",
    "_experts_implementation", "use_return_dict", "tokenizer_class", "_attn_implementation_autoset", "is_llama_config",
    "transformers.js_config", "unsloth_fixed", "unsloth_version",
})  # fmt: skip
"""Labels, outputs, marks of the tools that wrote the file (`is_llama_config` is SmolLM2's), and `router_aux_loss_coef`:
the run's own `model.router_aux_loss` decides."""

_SIZES = {
    "model_type": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_attention_heads": REQUIRED,
    "vocab_size": REQUIRED,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "is_causal": (True,),  # transformers' masks ask for it, whatever the family
}
_MLP_BIAS: dict[str, tuple[Any, ...]] = {"mlp_bias": (False, None)}
_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False, None)}
"""The families that have it ignore `sliding_window` without it; others use a window that is given."""
_QWEN3: dict[str, tuple[Any, ...]] = {"use_qk_norm": (True, None), "qkv_bias": (False, None)}
"""Written by some of its models, read by no code: Qwen3 always has the norms and never the bias."""

FAMILIES: Mapping[str, Fields] = {
    "llama": Fields(
        {**_SIZES, "max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None},
        {**_FIXED, **_MLP_BIAS},
    ),
    "qwen2": Fields({**_SIZES, "num_key_value_heads": 32, "head_dim": None}, {**_FIXED, **_WINDOW}),
    "qwen3": Fields({**_SIZES, "num_key_value_heads": 32, "head_dim": 128}, {**_FIXED, **_WINDOW, **_QWEN3}),
    "qwen3_moe": Fields(
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "head_dim": None,
            "num_experts": REQUIRED,
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        {**_FIXED, **_WINDOW, **_QWEN3},
    ),
    "mixtral": Fields(
        {
            **_SIZES,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {**_FIXED, "router_jitter_noise": (0.0, None)},
    ),
    "deepseek_v3": Fields(
        {
            **_SIZES,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "num_nextn_predict_layers": 1,
        },
        {
            **_FIXED,
            "rope_interleave": (True, None),
            "moe_layer_freq": (1,),
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
        },
        frozenset({"head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux"}),
    ),
}
"""By config.json's `model_type`."""


def refuse_unknown(hf_config: Mapping[str, Any], fields: Fields) -> None:
    """ValueError names the first field of a config.json that changes the computation, or might, and is not built."""
    for key, value in hf_config.items():
        if key in fields.fixed:
            if value not in fields.fixed[key]:
                raise ValueError(
                    f"config.json: {key} = {value!r} changes the computation in a way that is not built; supported: "
                    f"{', '.join(repr(v) for v in fields.fixed[key])}"
                )
        elif key == "sliding_window":
            if value is not None and "use_sliding_window" not in fields.fixed:
                raise ValueError(f"config.json: sliding_window = {value!r} is not built; supported: null")
        elif key == "layer_types":
            other = sorted({kind for kind in value or [] if kind != "full_attention"})
            if other:
                raise ValueError(f"config.json: layer_types contains {other[0]!r}; supported: 'full_attention'")
        elif key not in fields.used.keys() | fields.harmless | HARMLESS and value not in (None, False, 0, [], {}):
            raise ValueError(
                f"config.json: the field {key} = {value!r} is not known and might change the computation; if it does "
                "not, take it out of config.json"
            )
