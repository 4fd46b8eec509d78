"""This module makes small models: of the architecture of a given config.json, and of three families without one."""

from collections.abc import Mapping
from typing import Any

LARGEST_HIDDEN, LARGEST_LAYERS, LARGEST_VOCABULARY, MOST_EXPERTS = 128, 4, 4096, 16
"""A model with no more than these is taken as it is."""

MOE: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
}
_DENSE = {k: v for k, v in MOE.items() if "expert" not in k and "moe_" not in k and k != "norm_topk_prob"}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "moe": MOE,
    "dense": {**_DENSE, "model_type": "qwen3", "tie_word_embeddings": True},
    "latent": {
        **{k: v for k, v in _DENSE.items() if k != "head_dim"},
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
}
"""Small models of three kinds, as the contents of config.json. Heads have multiples of 8 elements, because cuDNN's
fused attention takes no others, and on a GPU context parallelism has no other attention."""

_SMALL: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
_DROPPED = ("quantization_config", "sliding_window", "max_window_layers", "rope_scaling", "pad_token_id")


def small_model(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return a config.json of the same family that every layout on one machine can hold, and whether it was shrunk.

    Weights are drawn with a standard deviation of 0.1, so that log-probs differ by nats.
    """
    known = {
        "hidden_size": LARGEST_HIDDEN,
        "num_hidden_layers": LARGEST_LAYERS,
        "vocab_size": LARGEST_VOCABULARY,
        "num_experts": MOST_EXPERTS,
        "num_local_experts": MOST_EXPERTS,
        "n_routed_experts": MOST_EXPERTS,
    }
    if all((config.get(name) or 0) <= most for name, most in known.items()):
        return {**config, "initializer_range": 0.1}, False
    small = {name: value for name, value in config.items() if name not in _DROPPED}
    small |= {name: value for name, value in _SMALL.items() if config.get(name) is not None}
    heads, groups = config.get("num_attention_heads", 8), config.get("num_key_value_heads")
    if groups is not None:
        small["num_key_value_heads"] = 8 if groups >= heads else 4
    if "mlp_only_layers" in small:
        small["mlp_only_layers"] = []
    return {**small, "initializer_range": 0.1}, True
