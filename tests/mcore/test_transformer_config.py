"""Settings that reach Megatron's TransformerConfig, as far as a CPU can build one."""

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig
from pydantic import ValidationError

from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.mcore.transformer_config import transformer_config
from fiberpo_megatron.trainer.fp8 import missing_for_fp8
from tests.distributed.parity import DEEPSEEK_V3, MODELS

DENSE = MODELS["dense"]


def build(hf_config: dict[str, Any], **model: Any) -> Any:
    settings = ModelConfig.model_validate({"path": "unused", **model})
    layout: Any = SimpleNamespace(parallel=ParallelConfig())
    return transformer_config(read_architecture(hf_config), settings, layout)


def test_fp8(monkeypatch: pytest.MonkeyPatch):
    config = build(DENSE, fp8="hybrid", fp8_recipe="blockwise")
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "blockwise")
    assert build(DENSE).fp8 is None
    # With experts Megatron asks for Transformer Engine's version.
    monkeypatch.setattr("megatron.core.transformer.transformer_config.is_te_min_version", lambda version: True)
    config = build(DEEPSEEK_V3, fp8="e4m3")
    assert (config.fp8, config.fp8_recipe) == ("e4m3", "tensorwise") and config.moe_router_padding_for_quantization


def test_fp8_needs_bfloat16():
    with pytest.raises(ValidationError, match='model.fp8 = "e4m3" with model.dtype = "float32"'):
        ModelConfig.model_validate({"path": "unused", "fp8": "e4m3", "dtype": "float32"})
    with pytest.raises(
        ValidationError, match='fp8_recipe\n.*delayed scaling come from earlier passes.*set "tensorwise" or'
    ):
        ModelConfig.model_validate({"path": "unused", "fp8_recipe": "delayed"})


@pytest.mark.parametrize(
    "available, spec, capability, recipe, message",
    [
        (False, True, (9, 0), "tensorwise", "no NVIDIA GPU is visible"),
        (True, False, (9, 0), "tensorwise", "Transformer Engine is not installed"),
        (True, True, (8, 0), "tensorwise", "A100 has compute capability 8.0, the tensorwise recipe needs 8.9"),
        (True, True, (9, 0), "mxfp8", "the mxfp8 recipe needs 10.0"),
        (True, True, (9, 0), "blockwise", None),
    ],
)
def test_what_is_missing_for_fp8(
    available: bool,
    spec: bool,
    capability: tuple[int, int],
    recipe: str,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "A100")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if spec else None)
    found = missing_for_fp8(recipe)
    assert found is None if message is None else found is not None and message in found


def test_latent_attention_of_deepseek():
    scaling = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    config = build({**DEEPSEEK_V3, "rope_scaling": {**scaling, "mscale_all_dim": 0.5}})
    assert isinstance(config, MLATransformerConfig)
    assert (config.rope_type, config.rotary_scaling_factor, config.mscale_all_dim) == ("yarn", 40.0, 0.5)
    assert config.moe_layer_freq == [0, 1, 1, 1]
    assert config.moe_router_bias_update_rate == 0.0 and config.moe_router_score_function == "sigmoid"
    plain = build(DEEPSEEK_V3)
    assert (plain.rope_type, plain.rotary_scaling_factor) == ("rope", 1.0)
