"""Describes Qwen3: it is Llama with norms on queries and keys."""

from fiberpo_megatron.mcore.families.architecture import Architecture
from fiberpo_megatron.mcore.families.common_rules import LLAMA, QK_NORM
from fiberpo_megatron.mcore.families.config_fields import FIXED, QWEN3, SIZES, WINDOW, ConfigReader, Fields
from fiberpo_megatron.mcore.families.decoder import decoder
from fiberpo_megatron.mcore.families.family import Family
from fiberpo_megatron.mcore.families.weight_tables import WeightTable


def _architecture(config: ConfigReader) -> Architecture:
    return decoder(config, qk_norm=True)


FAMILY = Family(
    fields=Fields(used={**SIZES, "num_key_value_heads": 32, "head_dim": 128}, fixed={**FIXED, **WINDOW, **QWEN3}),
    architecture=_architecture,
    weights=WeightTable((*LLAMA, *QK_NORM)),
)
