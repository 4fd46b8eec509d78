"""Defines how a family declares the fields of config.json that it understands, and how they are read and checked.

A field that changes the computation and that a family does not understand is refused by name, never ignored. Defaults
are those of transformers' config classes, because a config.json may leave out a field that has the default; a test
compares them with transformers. This module imports neither torch nor Megatron.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.printable import printable

REQUIRED = object()
"""The default of a field that config.json must contain."""


@dataclass(frozen=True)
class Fields:
    """This is what the config.json of one family may say."""

    used: Mapping[str, Any]
    """Fields that shape the model, each with the default that a missing field stands for."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Fields with an effect that is not built, and the values at which they have none; the first is the default."""
    harmless: frozenset[str] = frozenset()
    """Fields of this family alone that do not change the computation."""


HARMLESS = frozenset({
    "transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype",
    "torch_dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "pretraining_tp",
    "output_router_logits", "router_aux_loss_coef", "max_window_layers", "auto_map", "_attn_implementation",
    "_experts_implementation", "use_return_dict", "tokenizer_class", "_attn_implementation_autoset", "is_llama_config",
    "transformers.js_config", "unsloth_fixed", "unsloth_version",
})  # fmt: skip
"""Fields of any family that do not change the computation: labels, outputs, marks of the tools that wrote the file
(SmolLM2 has `is_llama_config`), and `router_aux_loss_coef`, because the run's own `model.router_aux_loss` decides."""

SIZES: Mapping[str, Any] = {
    "model_type": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_attention_heads": REQUIRED,
    "vocab_size": REQUIRED,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
}
"""Fields that every family here uses. Grouped-query attention also needs `num_key_value_heads` and `head_dim`."""
FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "is_causal": (True,),  # transformers' masks read it, whatever the family
}
"""Fields that every family accepts at these values only."""
WINDOW: Mapping[str, tuple[Any, ...]] = {"use_sliding_window": (False, None)}
"""Fixed field of families that ignore `sliding_window` unless this one is true; other families use a given window."""
QWEN3: Mapping[str, tuple[Any, ...]] = {"use_qk_norm": (True, None), "qkv_bias": (False, None)}
"""Fixed fields that some Qwen3 models write and no code reads: Qwen3 always has the norms and never the bias."""


_LARGEST = 2**31 - 1
"""Larger sizes are refused: no model has them, and Megatron computes with 32-bit numbers in places."""
_AT_MOST: Mapping[str, int] = {
    "num_hidden_layers": 10_000,
    "first_k_dense_replace": 10_000,
    "num_nextn_predict_layers": 10_000,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_routed_experts": 2**16,
}
"""Layers and experts are listed one by one, so that a number without bound would take memory without bound."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxlong = 3, 16, 16, 100, 60


def shown(value: object) -> str:
    """Return a value of config.json for a message, shortened, because a stranger may have written the file."""
    return printable(_SHORT.repr(value))


class ConfigReader:
    """Reads the fields of one config.json, with the family's defaults for those that it leaves out."""

    def __init__(self, given: Mapping[str, Any], fields: Fields) -> None:
        self.given = given
        """The content of config.json."""
        self._fields = fields

    def get(self, key: str) -> Any:
        """Return a field's value, or its default when config.json leaves it out (None for a required field).

        Raises ValueError for a field that the family reads without declaring it.
        """
        if key not in self._fields.used:
            raise ValueError(f"the model family reads {key!r} of config.json; declare it in `Fields.used`")
        default = self._fields.used[key]
        return self.given.get(key, None if default is REQUIRED else default)

    def number(self, key: str, at_least: int = 1) -> int:
        """Return a field that is a whole number. Raises ValueError for other values and numbers out of bounds."""
        value, at_most = self.get(key), _AT_MOST.get(key, _LARGEST)
        if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
            raise ValueError(
                f"config.json: {key} = {shown(value)}; a whole number from {at_least} to {at_most} is needed"
            )
        return value

    def number_if_given(self, key: str) -> int | None:
        """Return a field that is a whole number of at least 1; None if it is null or 0. Raises ValueError."""
        return self.number(key) if self.get(key) not in (None, 0) else None

    def positive(self, key: str) -> float:
        """Return a field that is a finite number above 0. Raises ValueError for any other value."""
        return positive(f"config.json: {key}", self.get(key))


def positive(field: str, value: object, at_least: float = 0.0) -> float:
    """Return `value` if it is a finite number above 0 and not below `at_least`; else raise ValueError on `field`."""
    wanted = f"of at least {at_least:g}" if at_least else "above 0"
    try:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        number = float(value)  # OverflowError for a whole number that no float can hold
        if not (math.isfinite(number) and number > 0 and number >= at_least):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{field} = {shown(value)}; a number {wanted} is needed") from None
    return number


def refuse_unknown(hf_config: Mapping[str, Any], fields: Fields) -> None:
    """Raise ValueError for the first field that changes the computation, or might, in a way that is not built."""
    for key, value in hf_config.items():
        if key in fields.fixed:
            if value not in fields.fixed[key]:
                raise ValueError(
                    f"config.json: {key} = {shown(value)} changes the computation in a way that is not built; "
                    f"supported: {', '.join(repr(v) for v in fields.fixed[key])}"
                )
        elif key == "sliding_window":
            if value is not None and "use_sliding_window" not in fields.fixed:
                raise ValueError(f"config.json: sliding_window = {shown(value)} is not built; supported: null")
        elif key == "layer_types":
            listed = value if isinstance(value, list) else [] if value is None else [value]
            other = next((kind for kind in listed if kind != "full_attention"), None)
            if other is not None:
                raise ValueError(f"config.json: layer_types contains {shown(other)}; supported: 'full_attention'")
        elif key not in fields.used.keys() | fields.harmless | HARMLESS and value not in (None, False, 0, [], {}):
            raise ValueError(
                f"config.json: the field {printable(key)} = {shown(value)} is not known and might change the "
                "computation; if it does not, take it out of config.json"
            )
