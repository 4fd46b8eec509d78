"""Reads the rotary embedding of a config.json and accepts the kinds that Megatron computes as transformers does.

This module imports neither torch nor Megatron.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fiberpo_megatron.mcore.families.config_fields import positive, shown
from fiberpo_megatron.printable import printable

Kind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class Rope:
    """Describes the angles of position p: p times the inverse frequencies of `theta`, changed as `kind` says."""

    theta: float
    kind: Kind = "default"
    factor: float = 1.0
    """Factor by which the context was stretched."""
    original_positions: int = 0
    """Context length before stretching (yarn)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """Both are set (DeepSeek) or neither is: arXiv 2309.00071, section 3.4, as transformers implements it."""
    truncate: bool = True
    """Whether yarn rounds its correction range to whole dimensions."""


_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""The constants of Llama 3.1 to 3.3, the only ones that Megatron computes with."""
_KEYS: Mapping[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", *_LLAMA3},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    },
}  # fmt: skip


def read_rope(hf_config: Mapping[str, Any], theta: float, *, latent: bool) -> Rope:
    """Return the rotary embedding of a config.json. Raises ValueError that names what is not built.

    `theta` is used where the embedding's own settings name none. `latent` says that the model has multi-head latent
    attention, for which Megatron has only the kinds "default" and "yarn".
    """
    given = {key: hf_config[key] for key in ("rope_parameters", "rope_scaling") if hf_config.get(key)}
    for name, settings in given.items():
        if not isinstance(settings, Mapping):
            raise ValueError(f"config.json: {name} = {shown(settings)}; an object with rope_type is needed")
    if len(given) == 2 and _plain(given["rope_parameters"]) != _plain(given["rope_scaling"]):
        raise ValueError(
            f"config.json: rope_parameters = {shown(given['rope_parameters'])} and rope_scaling = "
            f"{shown(given['rope_scaling'])} disagree; keep the one that the model was trained with"
        )
    field, raw = next(iter(given.items()), ("rope_parameters", {}))
    values = _plain(raw)
    kind = values.pop("rope_type")
    theta = values.pop("rope_theta", theta)

    def refuse(why: str) -> ValueError:
        return ValueError(f"config.json: {field} = {shown(raw)}: {why}")

    built = ("default", "yarn") if latent else tuple(_KEYS)
    if kind not in built:
        raise refuse(f"rope_type {shown(kind)} is not built; supported here: {', '.join(built)}")
    unknown = sorted(values.keys() - _KEYS[kind])
    if unknown:
        raise refuse(f"{printable(unknown[0])} = {shown(values[unknown[0]])} is not built for rope_type {kind!r}")
    theta = positive(f"config.json: {field}: rope_theta", theta)
    if kind == "default":
        return Rope(theta)
    factor = positive(f"config.json: {field}: factor", values.get("factor"), at_least=1)
    if kind == "llama3":
        for key, value in _LLAMA3.items():
            if values.get(key) != value:
                raise refuse(f"{key} = {shown(values.get(key))}; Megatron computes llama3 with {value} only")
    if kind != "yarn":
        return Rope(theta, kind, factor)

    def given_positive(key: str, value: object) -> float | None:
        return positive(f"config.json: {field}: {key}", value) if value else None

    mscale, all_dim = (given_positive(key, values.get(key)) for key in ("mscale", "mscale_all_dim"))
    if (mscale is None) != (all_dim is None):
        raise refuse("mscale and mscale_all_dim are built together; one of them is missing or 0")
    truncate = bool(values.get("truncate", True))
    if latent and not truncate:
        raise refuse("truncate = False is not built for latent attention")
    name = "original_max_position_embeddings"
    original = given_positive(name, values.get(name) or hf_config.get("max_position_embeddings"))
    if original is None:
        raise refuse(f"{name} is missing")
    fast, slow = (given_positive(key, values.get(key)) for key in ("beta_fast", "beta_slow"))
    return Rope(theta, "yarn", factor, int(original), fast or 32.0, slow or 1.0, mscale, all_dim, truncate)


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings under their current names, without those that have no effect."""
    values = {key: value for key, value in raw.items() if value is not None}
    kind = values.pop("type", "default")
    values.setdefault("rope_type", kind)
    if values.get("partial_rotary_factor") == 1:
        values.pop("partial_rotary_factor")
    return values
