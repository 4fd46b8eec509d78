"""What a Hugging Face config.json says about the computation. Pure: no torch, no Megatron.

A field that changes the computation and is not understood is refused by name (`config_fields.py`), never ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fiberpo_megatron.mcore.families.config_fields import FAMILIES, REQUIRED, Fields, refuse_unknown
from fiberpo_megatron.mcore.rope import Rope, read_rope


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). Sizes per head unless said."""

    query_rank: int | None
    """Of the compressed queries; None: queries are projected directly."""
    key_value_rank: int
    """Of the compressed keys and values, over all heads."""
    plain_size: int
    """Part of queries and keys without rotary embedding."""
    rotary_size: int
    """Part with rotary embedding; the keys' is shared by all heads."""
    value_size: int


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of the layers that have one."""

    count: int
    per_token: int
    ffn_size: int
    """Of one expert."""
    dense_layers: tuple[int, ...]
    """Layers, from 0, that have a plain MLP instead."""
    normalised: bool
    """Whether the chosen experts' probabilities are made to sum to 1."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    shared_ffn_size: int = 0
    """Of the experts that every token goes to, together."""
    correction_bias: bool = False
    """Whether a bias is added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437, equation 16)."""
    scaling: float | None = None
    """Factor of the chosen experts' probabilities."""
    groups: int | None = None
    """Groups of experts of which a token may use only some; None: any expert."""
    groups_per_token: int | None = None


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder with RMSNorm, rotary embeddings and SwiGLU."""

    model_type: str
    layers: int
    hidden_size: int
    ffn_size: int
    """Of a dense layer."""
    heads: int
    key_value_heads: int
    head_dim: int
    """Of queries and keys."""
    vocab_size: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    initializer_range: float
    max_positions: int
    qk_norm: bool
    qkv_bias: bool
    experts: Experts | None
    """None for a dense model."""
    latent: LatentAttention | None
    """None: grouped-query attention."""
    predict_layers: int
    """Multi-token prediction layers behind the model's own; their weights are neither loaded nor exported."""


class _Config:
    """Fields of a config.json with the family's defaults."""

    def __init__(self, hf_config: Mapping[str, Any], fields: Fields) -> None:
        self._given = hf_config
        self._fields = fields

    def get(self, key: str) -> Any:
        default = self._fields.used[key]
        return self._given.get(key, None if default is REQUIRED else default)

    def number(self, key: str, at_least: int = 1) -> int:
        value = self.get(key)
        if not isinstance(value, int) or value < at_least:
            raise ValueError(f"config.json: {key} = {value!r}; a whole number of at least {at_least} is needed")
        return value

    def positive(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"config.json: {key} = {value!r}; a number above 0 is needed")
        return float(value)


def read_architecture(hf_config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json; ValueError names what is missing or not supported."""
    family = str(hf_config.get("model_type"))
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type = {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    fields = FAMILIES[family]
    refuse_unknown(hf_config, fields)
    config = _Config(hf_config, fields)
    heads = config.number("num_attention_heads")
    latent = _latent(config) if family == "deepseek_v3" else None
    if latent:
        key_value_heads, head_dim = heads, latent.plain_size + latent.rotary_size
        if config.get("num_key_value_heads") not in (heads, None):
            raise ValueError(
                f"config.json: num_key_value_heads = {config.get('num_key_value_heads')} differs from "
                f"num_attention_heads = {heads}; latent attention has one key and value per query head"
            )
    else:
        key_value_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config.number("hidden_size") // heads
    return Architecture(
        model_type=family,
        layers=config.number("num_hidden_layers"),
        hidden_size=config.number("hidden_size"),
        ffn_size=config.number("intermediate_size"),
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=config.number("vocab_size"),
        norm_eps=config.positive("rms_norm_eps"),
        rope=read_rope(hf_config, config.get("rope_theta"), latent=latent is not None),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        initializer_range=config.positive("initializer_range"),
        max_positions=config.number("max_position_embeddings"),
        qk_norm=family in ("qwen3_moe", "qwen3"),
        qkv_bias=family == "qwen2",
        experts=_EXPERTS[family](config) if family in _EXPERTS else None,
        latent=latent,
        predict_layers=config.number("num_nextn_predict_layers", 0) if latent else 0,
    )


def used_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that shape the model, by name; those that config.json leaves out at their defaults."""
    used = FAMILIES[str(hf_config["model_type"])].used
    values = {key: hf_config.get(key, default) for key, default in used.items()}
    if any("rope_theta" in (values[key] or {}) for key in ("rope_parameters", "rope_scaling")):
        values["rope_theta"] = None
    return {key: value for key, value in values.items() if value is not None and value is not REQUIRED}


def _latent(config: _Config) -> LatentAttention:
    return LatentAttention(
        query_rank=None if config.get("q_lora_rank") is None else config.number("q_lora_rank"),
        key_value_rank=config.number("kv_lora_rank"),
        plain_size=config.number("qk_nope_head_dim"),
        rotary_size=config.number("qk_rope_head_dim"),
        value_size=config.number("v_head_dim"),
    )


def _qwen3_moe(config: _Config) -> Experts | None:
    count = config.number("num_experts" if config.get("num_local_experts") is None else "num_local_experts")
    step, dense = config.number("decoder_sparse_step"), config.get("mlp_only_layers") or []
    layers = range(config.number("num_hidden_layers"))
    dense_layers = tuple(layer for layer in layers if layer in dense or (layer + 1) % step)
    if len(dense_layers) == len(layers):
        return None
    normalised = bool(config.get("norm_topk_prob"))
    return Experts(
        count=count,
        per_token=_per_token(config, count, at_least=2 if normalised else 1),
        ffn_size=config.number("moe_intermediate_size"),
        dense_layers=dense_layers,
        normalised=normalised,
    )


def _per_token(config: _Config, available: int, at_least: int = 1) -> int:
    """`num_experts_per_tok`. One expert's normalised probability is always 1, which Megatron does not build."""
    value = config.number("num_experts_per_tok")
    if not at_least <= value <= available:
        raise ValueError(
            f"config.json: num_experts_per_tok = {value} is not built; supported here: {at_least} to {available}"
        )
    return value


def _mixtral(config: _Config) -> Experts:
    count = config.number("num_local_experts")
    return Experts(
        count=count,
        per_token=_per_token(config, count, at_least=2),
        ffn_size=config.number("intermediate_size"),
        dense_layers=(),
        normalised=True,
    )


def _deepseek_v3(config: _Config) -> Experts | None:
    layers, first = config.number("num_hidden_layers"), config.number("first_k_dense_replace", 0)
    if first >= layers:
        return None
    count, groups, chosen = config.number("n_routed_experts"), config.get("n_group") or 1, config.get("topk_group") or 1
    if chosen > groups or count % groups:
        raise ValueError(
            f"config.json: n_group = {groups} with topk_group = {chosen} and n_routed_experts = {count} cannot be; "
            "equal groups are needed, of which a token uses all or some"
        )
    per_token, normalised = _per_token(config, count // groups * chosen), bool(config.get("norm_topk_prob"))
    if normalised != (per_token > 1):
        raise ValueError(
            f"config.json: norm_topk_prob = {normalised} with num_experts_per_tok = {per_token} is not built: "
            "Megatron normalises sigmoid scores exactly when a token uses several experts"
        )
    limited = chosen < groups
    if limited and per_token // chosen != 2:
        raise ValueError(
            f"config.json: topk_group = {chosen} with num_experts_per_tok = {per_token} is not built: transformers "
            "ranks a group of experts by its best 2, Megatron by its best num_experts_per_tok // topk_group = "
            f"{per_token // chosen}"
        )
    return Experts(
        count=count,
        per_token=per_token,
        ffn_size=config.number("moe_intermediate_size"),
        dense_layers=tuple(range(first)),
        normalised=normalised,
        score="sigmoid",
        shared_ffn_size=config.number("n_shared_experts") * config.number("moe_intermediate_size"),
        correction_bias=True,
        scaling=config.positive("routed_scaling_factor"),
        groups=groups if limited else None,
        groups_per_token=chosen if limited else None,
    )


_EXPERTS = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral, "deepseek_v3": _deepseek_v3}
