"""Lists rules that several families share, under the names that Llama and its successors give to their tensors."""

from fiberpo_megatron.mcore.families.transforms import GateUp, Qkv, Split, Vocabulary, Whole
from fiberpo_megatron.mcore.families.weight_tables import (
    EMBEDDING,
    FINAL_NORM,
    HF_LAYER,
    OUTPUT,
    FusedExperts,
    Rule,
    layer_rule,
)

FRAME = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), Vocabulary()),
    Rule(FINAL_NORM, ("model.norm.weight",), Whole()),
    Rule(OUTPUT, ("lm_head.weight",), Vocabulary()),
)
"""Embedding, final norm and output layer."""
NORMS = (
    layer_rule("input_layernorm.weight", "input_layernorm.weight", Whole()),
    layer_rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", Whole()),
)
"""The norms before the attention and before the MLP of a layer."""
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (
    layer_rule("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), Qkv()),
    layer_rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", Split(1)),
)
"""Grouped-query attention."""
QKV_BIAS = (layer_rule("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV), Qkv()),)
"""The bias of queries, keys and values (`Architecture.qkv_bias`)."""
QK_NORM = (
    layer_rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", Whole()),
    layer_rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", Whole()),
)
"""The norms of queries and keys (`Architecture.qk_norm`)."""
DENSE = (
    layer_rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
    layer_rule("mlp.linear_fc2.weight", "mlp.down_proj.weight", Split(1)),
)
"""The MLP of a dense layer."""


def expert_rules(*, router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of a layer with experts; the names have no layer, those of an expert contain `{expert}`."""
    return (
        layer_rule("mlp.router.weight", router, Whole()),
        layer_rule("mlp.experts.{expert}.linear_fc1.weight", (gate, up), GateUp()),
        layer_rule("mlp.experts.{expert}.linear_fc2.weight", down, Split(1)),
    )


_EXPERT = "mlp.experts.{expert}."
MOE = expert_rules(
    router="mlp.gate.weight",
    gate=_EXPERT + "gate_proj.weight",
    up=_EXPERT + "up_proj.weight",
    down=_EXPERT + "down_proj.weight",
)
"""Experts under the names of Qwen and DeepSeek."""
FUSED_EXPERTS = (
    FusedExperts(
        HF_LAYER + "mlp.experts.gate_up_proj",
        (HF_LAYER + _EXPERT + "gate_proj.weight", HF_LAYER + _EXPERT + "up_proj.weight"),
    ),
    FusedExperts(HF_LAYER + "mlp.experts.down_proj", (HF_LAYER + _EXPERT + "down_proj.weight",)),
)
"""The experts of `MOE` as files store them when they stack all experts of a layer in one tensor."""
LLAMA = (*FRAME, *NORMS, *ATTENTION, *DENSE)
"""All parameters of a Llama model."""
