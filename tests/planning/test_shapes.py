"""The sizes read from config.json, against the exact lists of parameters and the published totals."""

import json
from pathlib import Path

import pytest

from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.planning.published import DATA
from fiberpo_megatron.planning.shapes import read_shape, shape_of

EXAMPLES = Path(__file__).parents[2] / "examples/planning"
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "hf_config",
    [
        QWEN2,
        *(config(EXAMPLES / name) for name in ("qwen3_30b_a3b", "qwen3_235b_a22b", "joyai_llm_flash")),
        config(DATA / "models/deepseek_v3"),
    ],
    ids=["qwen2", "qwen3-30b", "qwen3-235b", "joyai", "deepseek-v3"],
)
def test_the_same_as_the_exact_list_of_parameters(hf_config: dict[str, object]):
    read, exact = read_shape(hf_config), shape_of(read_architecture(hf_config))
    assert read.total == pytest.approx(exact.total, rel=1e-4)  # norms and biases inside attention are not counted
    assert read.dense_parameters == pytest.approx(exact.dense_parameters, rel=1e-3)
    for name in ("layers", "hidden", "moe_layers", "experts", "experts_per_token", "cache_heads", "cache_size", "ffn"):
        assert getattr(read, name) == getattr(exact, name), name
    assert read.expert_parameters == exact.expert_parameters


@pytest.mark.parametrize(
    ("model", "billions", "active"),
    [("deepseek_v3", 671, 37), ("qwen3_5_35b_a3b", 35, 3), ("qwen3_30b_a3b", 30.5, 3.3)],
)
def test_published_parameters(model: str, billions: float, active: float):
    shape = read_shape(config(DATA / "models" / model))
    assert shape.total / 1e9 == pytest.approx(billions, rel=0.02)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.12)  # the vendors count embeddings differently


def test_linear_attention_has_a_state_and_a_small_cache():
    hybrid, full = (read_shape(config(DATA / "models" / name)) for name in ("qwen3_5_35b_a3b", "qwen3_30b_a3b"))
    assert hybrid.attention_layers == 10 and full.attention_layers == 48
    assert hybrid.cache_bytes(1, 2) == 10 * 2 * 2 * 256 * 2 and full.cache_bytes(1, 2) == 48 * 4 * 2 * 128 * 2
    assert hybrid.state_bytes == 30 * 4 * 32 * 128 * 128 and full.state_bytes == 0


def test_every_gpu_holds_the_whole_latent_and_copies_of_few_heads():
    latent, grouped = (read_shape(config(DATA / "models" / name)) for name in ("deepseek_v3", "qwen3_235b_a22b"))
    assert latent.cache_bytes(32, 2) == latent.cache_bytes(1, 2) == 61 * 576 * 2
    assert grouped.cache_bytes(4, 2) * 4 == grouped.cache_bytes(1, 2)
    assert grouped.cache_bytes(16, 2) == grouped.cache_bytes(4, 2)
