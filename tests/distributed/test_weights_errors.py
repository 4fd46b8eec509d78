"""Checkpoints that do not fit their config: every rank stops with the tensor's name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiberpo_megatron.certify.processes import collect_ranks, run_ranks
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.model import build_model
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.settings import ModelConfig
from fiberpo_megatron.mcore.weights import export_hf, load_hf
from tests.distributed.parity import make_config
from tests.mcore.weights.weights_reference import read_config, write_model

Tensors = dict[str, Tensor]
LAYER = "model.layers.2."


def doctored(source: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a model whose tensors went through `change`."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def stack_experts(tensors: Tensors) -> None:
    """Store a layer's experts as transformers holds them in memory."""
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts."

        def taken(part: str, prefix: str = prefix) -> Tensor:
            return torch.stack([tensors.pop(f"{prefix}{expert}.{part}.weight") for expert in range(4)])

        tensors[prefix + "gate_up_proj"] = torch.cat([taken("gate_proj"), taken("up_proj")], dim=1)
        tensors[prefix + "down_proj"] = taken("down_proj")


CASES: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "missing": (
        "qwen3_moe",
        lambda t: t.pop(LAYER + "mlp.experts.1.up_proj.weight"),
        f"missing: {LAYER}mlp.experts.1.up_proj.weight",
    ),
    "unknown": (
        "qwen3_moe",
        lambda t: t.update({"model.vision.weight": torch.zeros(1)}),
        "unknown to the model: model.vision.weight",
    ),
    "shape": (
        "qwen3_moe",
        lambda t: t.update({LAYER + "self_attn.k_proj.weight": torch.zeros(8, 32)}),
        f"{LAYER}self_attn.k_proj.weight has shape (8, 32), the model of config.json needs (24, 32)",
    ),
    "layer too many": (
        "qwen3_moe",
        lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.zeros(32)}),
        "unknown to the model: model.layers.4.input_layernorm.weight",
    ),
    "expert too many": (
        "qwen3_moe",
        lambda t: t.update({LAYER + "mlp.experts.4.up_proj.weight": torch.zeros(24, 32)}),
        f"unknown to the model: {LAYER}mlp.experts.4.up_proj.weight",
    ),
    "bias without a place": (
        "qwen2",
        lambda t: t.update({LAYER + "self_attn.o_proj.bias": torch.zeros(32)}),
        f"unknown to the model: {LAYER}self_attn.o_proj.bias",
    ),
    "dense part in a MoE layer": (
        "qwen3_moe",
        lambda t: t.update({LAYER + "mlp.down_proj.weight": torch.zeros(32, 40)}),
        f"unknown to the model: {LAYER}mlp.down_proj.weight",
    ),
    "tied but different": (
        "qwen3-tied",
        lambda t: t.update({"lm_head.weight": torch.zeros(51, 32)}),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "tied and stored twice": (
        "qwen3-tied",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        "",
    ),
    "stacked experts": ("qwen3_moe", stack_experts, ""),
    "old rotary buffers": (
        "llama",
        lambda t: t.update({LAYER + "self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
        "",
    ),
}
"""Model, what is done to its tensors, the message (empty: loads and exports what was there before)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = {model for model, _, _ in CASES.values()}
    for name in names:
        write_model(root / name, name)
    cases = {case: doctored(root / model, root / case, change) for case, (model, change, _) in CASES.items()}
    return {**{name: root / name for name in names}, **cases}


def load_all(folders: dict[str, Path]) -> dict[str, tuple[str, Tensors]]:
    """Per case the error and, without one, what is exported."""
    config = make_config()
    layout = start_layout(read_config(folders["missing"]), config.parallel, config.run)
    out: dict[str, tuple[str, Tensors]] = {}
    for case in CASES:
        hf_config = read_config(folders[case])
        model = ModelConfig(path=folders[case], dtype="float32")
        chunks = build_model(read_architecture(hf_config), model, layout)
        for parameter in chunks[0].parameters():
            parameter.data.fill_(torch.nan)
        try:
            load_hf(chunks, hf_config, folders[case], layout)
        except ValueError as error:
            out[case] = (str(error), {})
        else:
            out[case] = ("", dict(export_hf(chunks, hf_config, layout)))
    chunks[0].decoder.layers[1].register_parameter("gain", torch.nn.Parameter(torch.ones(1)))
    try:
        load_hf(chunks, hf_config, folders[case], layout)
    except ValueError as error:
        out["no rule"] = (str(error), {})
    return out


def test_one_process(folders: dict[str, Path]) -> None:
    [found] = run_ranks(1, load_all, folders)
    for case, (model, _, message) in CASES.items():
        error, exported = found[case]
        assert message in error and bool(message) == bool(error), (case, error)
        if not message:
            stored = load_file(folders[model] / "model.safetensors")
            assert exported.keys() == stored.keys(), case
            assert all(torch.equal(exported[name], stored[name]) for name in stored), case
    assert "no rule in the weight table for the parameter(s) decoder.layers.1.gain" in found["no rule"][0]


def load_one(folder: Path) -> None:
    config = make_config(parallel={"pipeline": 2})
    hf_config = read_config(folder)
    layout = start_layout(hf_config, config.parallel, config.run)
    chunks = build_model(read_architecture(hf_config), ModelConfig(path=folder, dtype="float32"), layout)
    load_hf(chunks, hf_config, folder, layout)


def test_every_rank_stops(folders: dict[str, Path]) -> None:
    """The tensor belongs to the second stage only; the first must not wait for it."""
    for outcome in collect_ranks(2, load_one, folders["missing"]):
        assert outcome.error is not None and outcome.error.startswith("ValueError: loading weights from")
        assert "rank 1" in outcome.error and CASES["missing"][2] in outcome.error
