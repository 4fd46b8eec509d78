"""Any value in any field of config.json is read or refused in one line; nothing takes time or memory without bound."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.mcore.families import FAMILIES, read_architecture, read_hf_config, used_fields
from fiberpo_megatron.mcore.families.config_fields import REQUIRED
from fiberpo_megatron.mcore.parallel.checks import check_layout
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.printable import printable

BASE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts": 4,
    "num_local_experts": None,
    "num_experts_per_tok": 2,
    "n_routed_experts": 16,
    "moe_intermediate_size": 8,
}
VALUES: list[Any] = [
    10**9, 10**30, -1, 0, 1.5, 1e308, -0.0, True, False, None, "x", "", "\x1b[2J\n\u202e", [], [1], [[]], {}, {"a": 1},
    ["full_attention", 3], [None], {"rope_type": []}, {"rope_type": "yarn", "factor": "x"}, {"type": {}},
    {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 10**30}, "9" * 5000, list(range(10_000)),
    {"rope_type": "llama3", "factor": True}, {"rope_theta": 10**400}, {"rope_type": "linear", "factor": None},
]  # fmt: skip


def config_of(family: str) -> dict[str, Any]:
    known = FAMILIES[family].fields.used
    return {"model_type": family} | {
        key: BASE[key] for key in known if key in BASE and (known[key] is REQUIRED or BASE[key] is not None)
    }


def tried(hf_config: dict[str, Any]) -> str:
    """Everything that a start asks of a config.json; returns the refusal."""
    begin = time.process_time()
    try:
        read_architecture(hf_config)
        used_fields(hf_config)
        check_layout(hf_config, ParallelConfig(), 1)
        said = ""
    except ValueError as error:
        said = str(error)
        assert printable(said) == said and len(said) < 1500, said
    assert time.process_time() - begin < 2
    return said


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_field_with_hostile_values(family: str) -> None:
    base = config_of(family)
    assert tried(base) == ""
    fields = FAMILIES[family].fields
    for key in (*fields.used, *fields.fixed, "layer_types", "sliding_window", "unknown_field", "torch_dtype"):
        for value in VALUES:
            tried({**base, key: value})


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "vocab_size", "hidden_size"])
def test_numbers_that_no_model_has(key: str) -> None:
    said = tried({**config_of("qwen3_moe"), key: 10**10})
    assert f"config.json: {key} = 10000000000; a whole number from 1 to" in said


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(
        st.sampled_from(sorted({key for family in FAMILIES.values() for key in family.fields.used}))
        | st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    ),
)
def test_any_fields(family: str, fields: dict[str, Any]) -> None:
    tried({**config_of(family), **fields, "model_type": family})


def test_a_config_whose_values_are_nested_deep(tmp_path: Path) -> None:
    nested: Any = 1
    for _ in range(300):
        nested = {"a": nested}
    (tmp_path / "config.json").write_text(json.dumps({**config_of("llama"), "rope_scaling": nested}))
    assert "a = {'a':" in tried(read_hf_config(tmp_path))
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"model_type": "llama", "model_type": "qwen2"}', '{"x": NaN}', "\xff"]
)
def test_a_config_that_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        read_hf_config(tmp_path)
