"""Describes Qwen2 and Qwen2.5: they are Llama with a bias on queries, keys and values."""

from fiberpo_megatron.mcore.families.architecture import Architecture
from fiberpo_megatron.mcore.families.common_rules import LLAMA, QKV_BIAS
from fiberpo_megatron.mcore.families.config_fields import FIXED, SIZES, WINDOW, ConfigReader, Fields
from fiberpo_megatron.mcore.families.decoder import decoder
from fiberpo_megatron.mcore.families.family import Family
from fiberpo_megatron.mcore.families.weight_tables import WeightTable


def _architecture(config: ConfigReader) -> Architecture:
    return decoder(config, qkv_bias=True)


FAMILY = Family(
    fields=Fields(used={**SIZES, "num_key_value_heads": 32, "head_dim": None}, fixed={**FIXED, **WINDOW}),
    architecture=_architecture,
    weights=WeightTable((*LLAMA, *QKV_BIAS)),
)
