"""Describes Mixtral: it is Llama with experts in every layer."""

from fiberpo_megatron.mcore.families.architecture import Architecture, Experts
from fiberpo_megatron.mcore.families.common_rules import ATTENTION, FRAME, NORMS, expert_rules
from fiberpo_megatron.mcore.families.config_fields import FIXED, SIZES, ConfigReader, Fields
from fiberpo_megatron.mcore.families.decoder import decoder, experts_per_token
from fiberpo_megatron.mcore.families.family import Family
from fiberpo_megatron.mcore.families.weight_tables import WeightTable

_EXPERT = "block_sparse_moe.experts.{expert}."


def _architecture(config: ConfigReader) -> Architecture:
    count = config.number("num_local_experts")
    experts = Experts(
        count=count,
        per_token=experts_per_token(config, count, at_least=2),
        ffn_size=config.number("intermediate_size"),
        dense_layers=(),
        normalised=True,
    )
    return decoder(config, experts=experts)


FAMILY = Family(
    fields=Fields(
        used={
            **SIZES,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        fixed={**FIXED, "router_jitter_noise": (0.0, None)},
    ),
    architecture=_architecture,
    weights=WeightTable(
        (
            *FRAME,
            *NORMS,
            *ATTENTION,
            *expert_rules(
                router="block_sparse_moe.gate.weight",
                gate=_EXPERT + "w1.weight",
                up=_EXPERT + "w3.weight",
                down=_EXPERT + "w2.weight",
            ),
        )
    ),
)
