"""Describes Llama 2 and 3 and SmolLM2: this is the plain decoder that the other families change."""

from fiberpo_megatron.mcore.families.common_rules import LLAMA
from fiberpo_megatron.mcore.families.config_fields import FIXED, SIZES, Fields
from fiberpo_megatron.mcore.families.decoder import decoder
from fiberpo_megatron.mcore.families.family import Family
from fiberpo_megatron.mcore.families.weight_tables import WeightTable

FAMILY = Family(
    fields=Fields(
        used={**SIZES, "max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None},
        fixed={**FIXED, "mlp_bias": (False, None)},
    ),
    architecture=decoder,
    weights=WeightTable(LLAMA),
)
