"""config.json: what is read, what is honoured, what is refused by name."""

from typing import Any

import pytest
import transformers

from fiberpo_megatron.mcore.architecture import read_architecture
from tests.distributed.parity import QWEN3_MOE


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3MoeConfig(),
        transformers.Qwen3Config(),
        transformers.Qwen2Config(),
        transformers.LlamaConfig(),
        transformers.MixtralConfig(),
        transformers.DeepseekV3Config(),
    ],
    ids=lambda config: config.model_type,
)
def test_transformers_own_defaults_are_read(config: Any):
    architecture = read_architecture(config.to_dict())
    assert architecture.layers == config.num_hidden_layers
    assert architecture.key_value_heads == config.num_key_value_heads
    assert architecture.rope.theta == config.rope_parameters["rope_theta"]
    count = architecture.experts and architecture.experts.count
    assert count == getattr(config, "num_local_experts", None)


def test_both_places_of_rope_theta():
    new = {k: v for k, v in QWEN3_MOE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert read_architecture(new) == read_architecture(QWEN3_MOE)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_parameters"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window = 4096"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"num_experts": None}, "num_experts = None"),
        ({"rope_theta": None}, "rope_theta is missing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        read_architecture({**QWEN3_MOE, **change})


def test_an_unused_window_is_fine():
    read_architecture({**QWEN3_MOE, "sliding_window": 4096, "use_sliding_window": False})
