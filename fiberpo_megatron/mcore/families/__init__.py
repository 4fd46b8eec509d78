"""Defines the model families: a file for each says what config.json means and which tensors the parameters come from.

This package needs torch, but not Megatron, so that the launcher and the planner can use it. A family of your own is a
file that defines a `Family` out of the names that are exported here (docs/models.md). A run finds it when
`model.family` names it as "package.module:FAMILY", or when an installed package declares it under its `model_type` as
an entry point of the group `fiberpo.families`.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from fiberpo_megatron import plugins
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.mcore.families.architecture import Architecture, Experts, LatentAttention
from fiberpo_megatron.mcore.families.config_fields import FIXED, REQUIRED, SIZES, WINDOW, ConfigReader, Fields, shown
from fiberpo_megatron.mcore.families.decoder import decoder, experts_per_token
from fiberpo_megatron.mcore.families.family import FAMILY_KEY, Family
from fiberpo_megatron.mcore.families.rope import Rope, read_rope
from fiberpo_megatron.mcore.families.transforms import GateUp, Qkv, Split, Transform, Vocabulary, Whole
from fiberpo_megatron.mcore.families.weight_tables import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    FusedExperts,
    Rule,
    WeightTable,
    layer_rule,
)

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "FINAL_NORM",
    "FIXED",
    "OUTPUT",
    "REQUIRED",
    "SIZES",
    "WINDOW",
    "Architecture",
    "ConfigReader",
    "Experts",
    "Family",
    "Fields",
    "FusedExperts",
    "GateUp",
    "LatentAttention",
    "Qkv",
    "Rope",
    "Rule",
    "Split",
    "Transform",
    "Vocabulary",
    "WeightTable",
    "Whole",
    "decoder",
    "experts_per_token",
    "family_of",
    "layer_rule",
    "read_architecture",
    "read_hf_config",
    "read_rope",
    "used_fields",
]


def _imported(path: str) -> Family:
    module, _, name = path.partition(":")
    family = getattr(import_module(module), name)
    assert isinstance(family, Family), path
    return family


FAMILIES: Mapping[str, Family] = {name: _imported(path) for name, path in plugins.BUILT_IN["families"].items()}
"""This package's own families by config.json's `model_type`."""


def family_of(hf_config: Mapping[str, Any], override: str | None = None) -> Family:
    """Return the family of a model.

    `override` is the run's `model.family`: an import path ("package.module:FAMILY") or the name of a family whose
    models config.json describes under another `model_type`. Without it the family is the one that `read_hf_config`
    noted, or that of config.json's `model_type`: one of this package or an entry point of the group
    `fiberpo.families`. Raises ValueError that says which families exist, or why the named one cannot be used.
    """
    name = override or hf_config.get(FAMILY_KEY)
    if name is not None:
        return FAMILIES[name] if name in FAMILIES else _plugin(name)
    model_type = str(hf_config.get("model_type"))
    return FAMILIES[model_type] if model_type in FAMILIES else _declared(model_type)


@cache  # looking through the installed packages takes tens of milliseconds, and the planner asks for every layout
def _declared(model_type: str) -> Family:
    known = plugins.short_names("families")
    if model_type not in known:
        raise ValueError(
            f"config.json: model_type = {shown(model_type)} is not supported; use one of {', '.join(known)}, or set "
            'model.family to the import path of a family of your own ("package.module:FAMILY", docs/models.md)'
        )
    return _plugin(model_type)


@cache
def _plugin(name: str) -> Family:
    plugin = plugins.find("families", name, "model.family")
    if not isinstance(plugin.target, Family):
        raise plugins.PluginError(
            f'model.family = "{name}": {plugin.path} is {plugin.target!r}, not a Family; name the object that '
            "`Family(...)` returned"
        )
    return plugin.target


def read_hf_config(folder: str | Path, family: str | None = None) -> dict[str, Any]:
    """Return the content of a model folder's config.json, in which a run's `model.family` is noted.

    Everything that takes an `hf_config` then uses that family. Raises OSError for a file that cannot be opened, and
    ValueError for one that is not a JSON object (`json_files.read_object`) or that tries to name a family itself: a
    model must not choose code to import.
    """
    path = Path(folder) / "config.json"
    hf_config = read_object(path)
    if FAMILY_KEY in hf_config:
        raise ValueError(f"{path}: {FAMILY_KEY} must not stand in config.json; remove it and set model.family")
    return hf_config if family is None else {**hf_config, FAMILY_KEY: family}


def read_architecture(hf_config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Raises ValueError that names what is missing or not supported."""
    return family_of(hf_config).read_architecture(hf_config)


def used_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that shape the model by name; those that config.json leaves out have their defaults."""
    return family_of(hf_config).used_fields(hf_config)
