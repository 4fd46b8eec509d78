"""Describes DeepSeek-V3, and models that use its config and class (Moonlight, JoyAI-LLM Flash).

The family has latent attention with and without compressed queries, dense first layers, shared experts, a sigmoid
router with a correction bias, a choice limited to groups of experts, and scaled probabilities.
"""

from fiberpo_megatron.mcore.families.architecture import Architecture, Experts, LatentAttention
from fiberpo_megatron.mcore.families.common_rules import DENSE, FRAME, FUSED_EXPERTS, MOE, NORMS
from fiberpo_megatron.mcore.families.config_fields import FIXED, SIZES, ConfigReader, Fields, shown
from fiberpo_megatron.mcore.families.decoder import decoder, experts_per_token
from fiberpo_megatron.mcore.families.family import Family
from fiberpo_megatron.mcore.families.transforms import GateUp, Split, Whole
from fiberpo_megatron.mcore.families.weight_tables import HF_LAYER, WeightTable, layer_rule


def _architecture(config: ConfigReader) -> Architecture:
    heads, key_value_heads = config.number("num_attention_heads"), config.get("num_key_value_heads")
    if key_value_heads not in (heads, None):
        raise ValueError(
            f"config.json: num_key_value_heads = {shown(key_value_heads)} differs from num_attention_heads = {heads}; "
            "latent attention has one key and value per query head"
        )
    return decoder(
        config,
        latent=_latent(config),
        experts=_experts(config),
        predict_layers=config.number("num_nextn_predict_layers", 0),
    )


def _latent(config: ConfigReader) -> LatentAttention:
    return LatentAttention(
        query_rank=None if config.get("q_lora_rank") is None else config.number("q_lora_rank"),
        key_value_rank=config.number("kv_lora_rank"),
        plain_size=config.number("qk_nope_head_dim"),
        rotary_size=config.number("qk_rope_head_dim"),
        value_size=config.number("v_head_dim"),
    )


def _experts(config: ConfigReader) -> Experts | None:
    layers, first = config.number("num_hidden_layers"), config.number("first_k_dense_replace", 0)
    if first >= layers:
        return None
    count = config.number("n_routed_experts")
    groups, chosen = config.number_if_given("n_group") or 1, config.number_if_given("topk_group") or 1
    if chosen > groups or count % groups:
        raise ValueError(
            f"config.json: n_group = {groups} with topk_group = {chosen} and n_routed_experts = {count} cannot be; "
            "equal groups are needed, of which a token uses all or some"
        )
    per_token = experts_per_token(config, count // groups * chosen)
    normalised = bool(config.get("norm_topk_prob"))
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


LATENT_ATTENTION = (
    layer_rule("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", Split(0)),
    layer_rule("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", Whole()),
    layer_rule("self_attention.q_layernorm.weight", "self_attn.q_a_layernorm.weight", Whole()),
    layer_rule("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", Split(0)),
    layer_rule("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", Whole()),
    layer_rule("self_attention.kv_layernorm.weight", "self_attn.kv_a_layernorm.weight", Whole()),
    layer_rule("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", Split(0)),
    layer_rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", Split(1)),
)
_SHARED = "mlp.shared_experts."
SHARED_EXPERTS = (
    layer_rule(_SHARED + "linear_fc1.weight", (_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"), GateUp()),
    layer_rule(_SHARED + "linear_fc2.weight", _SHARED + "down_proj.weight", Split(1)),
)
CORRECTION_BIAS = (layer_rule("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", Whole()),)

FAMILY = Family(
    fields=Fields(
        used={
            **SIZES,
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
        fixed={
            **FIXED,
            "rope_interleave": (True, None),
            "moe_layer_freq": (1,),
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
        },
        harmless=frozenset({"head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux"}),
    ),
    architecture=_architecture,
    weights=WeightTable(
        (*FRAME, *NORMS, *LATENT_ATTENTION, *DENSE, *MOE, *CORRECTION_BIAS, *SHARED_EXPERTS),
        FUSED_EXPERTS,
        predicted=HF_LAYER,
    ),
)
