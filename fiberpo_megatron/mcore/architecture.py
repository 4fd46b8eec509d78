"""What a Hugging Face config.json says about the computation. Pure: no torch, no Megatron.

A field that changes the computation and is not understood here is refused by name, never ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("qwen3_moe", "qwen3", "qwen2", "llama", "mixtral")

_USED = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
    "tie_word_embeddings", "initializer_range", "max_position_embeddings", "num_experts", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
}  # fmt: skip

_WITHOUT_EFFECT = {
    "transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype",
    "torch_dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "pretraining_tp",
    "output_router_logits", "router_aux_loss_coef", "max_window_layers", "rope_theta", "auto_map",
    "_attn_implementation", "_experts_implementation", "use_return_dict", "tokenizer_class",
}  # fmt: skip
"""Labels, outputs, and `router_aux_loss_coef`: the run's own `model.router_aux_loss` decides."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""Fields with an effect that is not built here, and the values at which they have none."""


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder with RMSNorm, rotary embeddings, grouped queries and SwiGLU."""

    model_type: str
    layers: int
    hidden_size: int
    ffn_size: int
    """Of a dense layer; for a mixture of experts of one expert."""
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    initializer_range: float
    max_positions: int
    qk_norm: bool
    qkv_bias: bool
    experts: int | None
    """None for a dense model."""
    experts_per_token: int
    norm_topk_prob: bool
    """Whether the chosen experts' probabilities are made to sum to 1."""


def read_architecture(hf_config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json; ValueError names what is missing or not supported."""
    family = hf_config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type = {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    _refuse_unknown(hf_config)
    moe = family in ("qwen3_moe", "mixtral")
    heads = _need(hf_config, "num_attention_heads")
    hidden = _need(hf_config, "hidden_size")
    return Architecture(
        model_type=family,
        layers=_need(hf_config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=_need(hf_config, "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"),
        heads=heads,
        key_value_heads=hf_config.get("num_key_value_heads") or heads,
        head_dim=hf_config.get("head_dim") or hidden // heads,
        vocab_size=_need(hf_config, "vocab_size"),
        norm_eps=float(hf_config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(hf_config),
        tied_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        initializer_range=float(hf_config.get("initializer_range", 0.02)),
        max_positions=int(hf_config.get("max_position_embeddings", 32768)),
        qk_norm=family in ("qwen3_moe", "qwen3"),
        qkv_bias=family == "qwen2",
        experts=_experts(hf_config) if moe else None,
        experts_per_token=_need(hf_config, "num_experts_per_tok") if moe else 0,
        norm_topk_prob=bool(hf_config.get("norm_topk_prob", False)) if family == "qwen3_moe" else True,
    )


def _need(hf_config: Mapping[str, Any], key: str) -> int:
    value = hf_config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} = {value!r}; a whole number of at least 1 is needed")
    return value


def _experts(hf_config: Mapping[str, Any]) -> int:
    return _need(hf_config, "num_experts" if "num_experts" in hf_config else "num_local_experts")


def _rope_theta(hf_config: Mapping[str, Any]) -> float:
    rope = dict(hf_config.get("rope_parameters") or {})
    scaling = dict(hf_config.get("rope_scaling") or {})
    for field, values in (("rope_parameters", rope), ("rope_scaling", scaling)):
        kind = values.pop("rope_type", values.pop("type", "default"))
        values.pop("type", None)
        extra = {key: value for key, value in values.items() if key != "rope_theta" and value is not None}
        if extra.get("partial_rotary_factor") == 1:
            extra.pop("partial_rotary_factor")
        if kind != "default" or extra:
            raise ValueError(
                f"config.json: {field} = {hf_config[field]!r} asks for scaled rotary embeddings, which are not built; "
                'only rope_type "default" with a rope_theta is supported'
            )
    theta = rope.get("rope_theta", scaling.get("rope_theta", hf_config.get("rope_theta")))
    if theta is None:
        raise ValueError("config.json: rope_theta is missing (also inside rope_parameters)")
    return float(theta)


def _refuse_unknown(hf_config: Mapping[str, Any]) -> None:
    for key, value in hf_config.items():
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                raise ValueError(
                    f"config.json: {key} = {value!r} changes the computation in a way that is not built; supported: "
                    f"{', '.join(repr(v) for v in _NEUTRAL[key])}"
                )
        elif key == "sliding_window":
            if value is not None and hf_config.get("use_sliding_window") is not False:
                raise ValueError(f"config.json: sliding_window = {value!r} is not built; supported: null")
        elif key == "layer_types":
            other = sorted({kind for kind in value or [] if kind != "full_attention"})
            if other:
                raise ValueError(f"config.json: layer_types contains {other[0]!r}; supported: 'full_attention'")
        elif key not in _USED and key not in _WITHOUT_EFFECT and value not in (None, False, 0, [], {}):
            raise ValueError(
                f"config.json: the field {key} = {value!r} is not known and might change the computation; if it does "
                "not, take it out of config.json"
            )
