"""Defines the one object that describes a model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.mcore.families.architecture import Architecture
from fiberpo_megatron.mcore.families.config_fields import REQUIRED, ConfigReader, Fields, refuse_unknown
from fiberpo_megatron.mcore.families.weight_tables import WeightTable

FAMILY_KEY = "fiberpo_family"
"""Key under which `read_hf_config` notes the family that a run names. It never stands in a config.json."""


@dataclass(frozen=True)
class Family:
    """Describes all models of one `model_type`: their config.json and their tensors.

    The Megatron model is built from the architecture, and the planner computes the shapes of all parameters from it.
    """

    fields: Fields
    """The fields of config.json that the family understands."""
    architecture: Callable[[ConfigReader], Architecture]
    """Returns what a config.json means. Raises ValueError for values that are not built; unknown fields have already
    been refused."""
    weights: WeightTable
    """Which Hugging Face tensors each parameter of the Megatron model is made of."""

    def read_architecture(self, hf_config: Mapping[str, Any]) -> Architecture:
        """Return the architecture of a config.json. Raises ValueError that names what is missing or not supported."""
        given = {key: value for key, value in hf_config.items() if key != FAMILY_KEY}
        refuse_unknown(given, self.fields)
        return self.architecture(ConfigReader(given, self.fields))

    def used_fields(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that shape the model by name; those that config.json leaves out have their defaults."""
        values = {key: hf_config.get(key, default) for key, default in self.fields.used.items()}
        if any("rope_theta" in (values.get(key) or ()) for key in ("rope_parameters", "rope_scaling")):
            values["rope_theta"] = None
        return {key: value for key, value in values.items() if value is not None and value is not REQUIRED}
