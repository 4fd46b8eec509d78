"""Which Hugging Face tensors a Megatron parameter is made of: one declarative table per model family.

Megatron names are those of the local layer spec with global numbers in place of `{layer}` and `{expert}`; the
Transformer-Engine spec's names are brought to this form by `canonical_name`.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from fiberpo_megatron.mcore.families.transforms import (
    Dimensions,
    GateUp,
    Qkv,
    Split,
    Transform,
    Vocabulary,
    Whole,
)

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"


@lru_cache(maxsize=1024)
def name_pattern(template: str) -> re.Pattern[str]:
    """Regular expression of a name with `{layer}` and `{expert}`."""
    escaped = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(escaped)


@dataclass(frozen=True)
class Match:
    """A name that fits a template."""

    layer: int | None
    expert: int | None


def match_name(template: str, name: str) -> Match | None:
    """The numbers in `name`, or None when it does not fit."""
    found = name_pattern(template).fullmatch(name)
    if found is None:
        return None
    numbers = {key: int(value) for key, value in found.groupdict().items()}
    return Match(numbers.get("layer"), numbers.get("expert"))


def fill(template: str, match: Match) -> str:
    """`template` with the match's numbers."""
    return template.format(layer=match.layer, expert=match.expert)


@dataclass(frozen=True)
class Rule:
    """One kind of parameter."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform
    exported: bool = True
    """False for a copy of another parameter (tied output weights on the last pipeline stage)."""


@dataclass(frozen=True)
class FusedExperts:
    """Expert weights of a layer stacked in one tensor [experts, rows, columns], as some files store them.

    `parts` are the per-expert names whose rows lie above each other in it.
    """

    hf: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    rules: tuple[Rule, ...]
    fused_experts: tuple[FusedExperts, ...] = ()
    ignored: str = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    """Regular expression of tensors that carry no weights."""

    def rule_of(self, name: str) -> tuple[Rule, Match] | None:
        """The rule of a canonical Megatron name, with the name's numbers; None when no rule fits."""
        for rule in self.rules:
            match = match_name(rule.megatron, name)
            if match is not None:
                return rule, match
        return None

    def position(self, name: str) -> tuple[int, int, int]:
        """Sort key of a canonical name: embedding, layers (experts last), final norm, output layer."""
        described = self.rule_of(name)
        assert described is not None, name
        rule, match = described
        outside = -1 if rule.megatron == EMBEDDING else sys.maxsize
        layer = outside if match.layer is None else match.layer
        return layer, -1 if match.expert is None else match.expert, self.rules.index(rule)

    def for_model(self, dims: Dimensions) -> "Family":
        """The table of one model: a tied output layer is a copy of the embedding; layers that predict tokens
        further ahead are not built."""
        ignored, rules = self.ignored, self.rules
        if dims.predict_layers:
            behind = "|".join(str(dims.layers + i) for i in range(dims.predict_layers))
            ignored = rf"{ignored}|model\.layers\.({behind})\..*"
        if dims.tied_embeddings:
            tied = Rule(OUTPUT, (HF_EMBEDDING,), Vocabulary(), exported=False)
            rules = tuple(tied if rule.megatron == OUTPUT else rule for rule in rules)
        return replace(self, rules=rules, ignored=ignored)


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _layer(megatron: str, hf: tuple[str, ...], transform: Transform) -> Rule:
    return Rule(_LAYER + megatron, tuple(_HF_LAYER + name for name in hf), transform)


_FRAME = (
    Rule(EMBEDDING, (HF_EMBEDDING,), Vocabulary()),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Whole()),
    Rule(OUTPUT, (HF_OUTPUT,), Vocabulary()),
)
_NORMS = (
    _layer("input_layernorm.weight", ("input_layernorm.weight",), Whole()),
    _layer("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), Whole()),
)
_QKV_NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (
    _layer("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV_NAMES), Qkv()),
    _layer("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), Split(1)),
)
_QKV_BIAS = (_layer("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV_NAMES), Qkv()),)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), Whole()),
    _layer("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), Whole()),
)
_DENSE = (
    _layer("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
    _layer("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Split(1)),
)


def _experts(router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    return (
        _layer("mlp.router.weight", (router,), Whole()),
        _layer("mlp.experts.{expert}.linear_fc1.weight", (gate, up), GateUp()),
        _layer("mlp.experts.{expert}.linear_fc2.weight", (down,), Split(1)),
    )


_EXPERT = "mlp.experts.{expert}."
_MOE = _experts(
    "mlp.gate.weight", _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight", _EXPERT + "down_proj.weight"
)
_MOE_FUSED = (
    FusedExperts(
        _HF_LAYER + "mlp.experts.gate_up_proj",
        (_HF_LAYER + _EXPERT + "gate_proj.weight", _HF_LAYER + _EXPERT + "up_proj.weight"),
    ),
    FusedExperts(_HF_LAYER + "mlp.experts.down_proj", (_HF_LAYER + _EXPERT + "down_proj.weight",)),
)
_MIXTRAL = "block_sparse_moe.experts.{expert}."

_SHARED = "mlp.shared_experts."
_SHARED_EXPERTS = (
    _layer(_SHARED + "linear_fc1.weight", (_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"), GateUp()),
    _layer(_SHARED + "linear_fc2.weight", (_SHARED + "down_proj.weight",), Split(1)),
)
_CORRECTION_BIAS = (_layer("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), Whole()),)
_LATENT_ATTENTION = (
    _layer("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",), Split(0)),
    _layer("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",), Whole()),
    _layer("self_attention.q_layernorm.weight", ("self_attn.q_a_layernorm.weight",), Whole()),
    _layer("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",), Split(0)),
    _layer("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",), Whole()),
    _layer("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",), Whole()),
    _layer("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",), Split(0)),
    _layer("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), Split(1)),
)

_LLAMA = (*_FRAME, *_NORMS, *_ATTENTION, *_DENSE)
FAMILIES: Mapping[str, Family] = {
    "llama": Family(_LLAMA),
    "qwen2": Family((*_LLAMA, *_QKV_BIAS)),
    "qwen3": Family((*_LLAMA, *_QK_NORM)),
    "qwen3_moe": Family((*_LLAMA, *_QK_NORM, *_MOE), _MOE_FUSED),
    "mixtral": Family(
        (
            *_FRAME,
            *_NORMS,
            *_ATTENTION,
            *_experts(
                "block_sparse_moe.gate.weight",
                _MIXTRAL + "w1.weight",
                _MIXTRAL + "w3.weight",
                _MIXTRAL + "w2.weight",
            ),
        )
    ),
    "deepseek_v3": Family(
        (*_FRAME, *_NORMS, *_LATENT_ATTENTION, *_DENSE, *_MOE, *_CORRECTION_BIAS, *_SHARED_EXPERTS), _MOE_FUSED
    ),
}
"""By config.json's `model_type`."""


def family_of(hf_config: Mapping[str, object], dims: Dimensions) -> Family:
    """The table of a model; raises ValueError for a family without one."""
    name = hf_config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} has no weight table; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[str(name)].for_model(dims)


_TE_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$"), r"self_attention.\1_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$"), r"mlp.experts.\3.\1.\2"),
    (re.compile(r"mlp\.experts\.local_experts\.(\d+)\."), r"mlp.experts.\1."),
)


def canonical_name(name: str, layer: int | None, first_expert: int) -> str:
    """The tables' name of a module's parameter.

    `layer` is the global number of the layer that it belongs to (None outside layers), `first_expert` the
    global number of this rank's first expert.
    """
    for pattern, replacement in _TE_NAMES:
        name = pattern.sub(replacement, name)
    if layer is not None:
        name = re.sub(r"^decoder\.layers\.\d+\.", f"decoder.layers.{layer}.", name)
    return re.sub(r"mlp\.experts\.(\d+)\.", lambda m: f"mlp.experts.{int(m[1]) + first_expert}.", name)
