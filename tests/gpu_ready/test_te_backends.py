"""Transformer Engine's choice of the attention backend for what the shipped configs run on GPUs."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.mcore.families import read_architecture
from tests.gpu_ready.te_backends import Attention, choose
from tests.gpu_ready.te_ranks import driver_of
from tests.gpu_ready.te_stub import VERSIONS
from tests.variations import varied

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "fiberpo_megatron/planning/data/models"
HEADS = {
    "Qwen3-8B": (32, 8, 128),
    "model": (9, 3, 64),  # SmolLM2-135M
}
"""Heads, key-value heads and their size of models whose config.json is not part of this repository."""
GPUS = {"H100": (9, 0), "B200": (10, 0)}


def shipped() -> list[tuple[str, dict[str, Any]]]:
    """The configs of examples that run in bfloat16, which is to say on GPUs."""
    found = [(str(path.relative_to(ROOT)), tomllib.loads(path.read_text())) for path in ROOT.glob("examples/*/*.toml")]
    return sorted((name, config) for name, config in found if config.get("model", {}).get("dtype") == "bfloat16")


def attention_of(config: dict[str, Any]) -> Attention:
    path = config["model"]["path"]
    folder = MODELS / Path(path).name.lower().replace("-", "_")
    if "demo" in path:
        folder = ROOT / "examples/demo/model"
    if folder.is_dir():
        architecture = read_architecture(json.loads((folder / "config.json").read_text()))
        heads, groups, size = architecture.heads, architecture.key_value_heads, architecture.head_dim
    else:
        heads, groups, size = HEADS[Path(path).name]
    parallel = config.get("parallel", {})
    tensor = parallel.get("tensor", 1)
    return Attention(heads // tensor, groups // tensor, size, size, context=parallel.get("context", 1))


@pytest.fixture(scope="module", params=varied(VERSIONS, VERSIONS[:1]))
def version(request: pytest.FixtureRequest) -> str:
    return request.param


def choice(version: str, *asked: Attention) -> list[str]:
    return driver_of(version).call(choose, list(asked))


def test_there_are_shipped_configs_for_gpus():
    assert {name.split("/")[1] for name, _ in shipped()} >= {"demo", "smollm2", "slurm", "qwen3_30b_a3b"}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name, config", shipped(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_shipped_config_gets_the_fused_kernel(name: str, config: dict[str, Any], gpu: str, version: str):
    one = attention_of(config)
    asked = Attention(one.heads, one.groups, one.size, one.value_size, context=one.context, capability=GPUS[gpu])
    assert choice(version, asked) == ["fused"]


@pytest.mark.parametrize("gpu", GPUS)
def test_latent_attention_and_context_parallelism_get_it_too(gpu: str, version: str):
    asked = [
        Attention(heads, groups, size, value, context=context, capability=GPUS[gpu])
        for heads, groups, size, value in [(16, 16, 192, 128), (32, 4, 128, 128)]
        for context in (1, 2, 8)
    ]
    assert choice(version, *asked) == ["fused"] * len(asked)


def test_float32_gets_no_kernel(version: str):
    """Preflight refuses it: without context parallelism Transformer Engine from 2.11 on builds the whole matrix of
    scores, which costs memory quadratic in the row, and everything else has nothing."""
    alone, cut = choice(version, *(Attention(16, 4, dtype="float32", context=context) for context in (1, 2)))
    assert alone == ("unfused" if version != "2.10.0" else "none") and cut == "none"


def test_sizes_that_no_kernel_has(version: str):
    """The choice really depends on what is asked: a head of 12 elements has no kernel, and an A100 none for packed
    rows."""
    narrow, ampere = choice(version, Attention(16, 16, 12, 12), Attention(16, 16, capability=(8, 0)))
    assert narrow != "fused" and ampere != "fused"
