"""Describes Qwen3-MoE: it is Qwen3 with experts, and dense layers among them (`mlp_only_layers`)."""

from fiberpo_megatron.mcore.families.architecture import Architecture, Experts
from fiberpo_megatron.mcore.families.common_rules import FUSED_EXPERTS, LLAMA, MOE, QK_NORM
from fiberpo_megatron.mcore.families.config_fields import (
    FIXED,
    QWEN3,
    REQUIRED,
    SIZES,
    WINDOW,
    ConfigReader,
    Fields,
    shown,
)
from fiberpo_megatron.mcore.families.decoder import decoder, experts_per_token
from fiberpo_megatron.mcore.families.family import Family
from fiberpo_megatron.mcore.families.weight_tables import WeightTable


def _architecture(config: ConfigReader) -> Architecture:
    return decoder(config, qk_norm=True, experts=_experts(config))


def _experts(config: ConfigReader) -> Experts | None:
    count = config.number("num_experts" if config.get("num_local_experts") is None else "num_local_experts")
    step, dense = config.number("decoder_sparse_step"), config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"config.json: mlp_only_layers = {shown(dense)}; a list of layers is needed")
    layers = range(config.number("num_hidden_layers"))
    dense_layers = tuple(layer for layer in layers if layer in dense or (layer + 1) % step)
    if len(dense_layers) == len(layers):
        return None
    normalised = bool(config.get("norm_topk_prob"))
    return Experts(
        count=count,
        per_token=experts_per_token(config, count, at_least=2 if normalised else 1),
        ffn_size=config.number("moe_intermediate_size"),
        dense_layers=dense_layers,
        normalised=normalised,
    )


FAMILY = Family(
    fields=Fields(
        used={
            **SIZES,
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
        fixed={**FIXED, **WINDOW, **QWEN3},
    ),
    architecture=_architecture,
    weights=WeightTable((*LLAMA, *QK_NORM, *MOE), FUSED_EXPERTS),
)
