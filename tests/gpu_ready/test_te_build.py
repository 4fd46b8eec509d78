"""The layers that a GPU would run are built on a CPU, with Transformer Engine's own Python.

For every family, two versions of Transformer Engine and layouts over gloo: no keyword is unknown, no shape is wrong,
the names in checkpoints are those of the CPU's layers, and every tensor of the Hugging Face folder is exported.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.families import FAMILIES
from tests.gpu_ready.te_build import KINDS, Built, build, fuses_weight_gradients, save_after_fp8
from tests.gpu_ready.te_ranks import Driver, driver_of
from tests.gpu_ready.te_stub import VERSIONS, folder_of
from tests.variations import varied

LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "EP2": {"data": 2, "expert": 2}}
ALL = {"TP2 PP2": {"tensor": 2, "pipeline": 2}, "TP2 EP2 DP2": {"tensor": 2, "data": 2, "expert": 2}}


@pytest.fixture(scope="module", params=varied(VERSIONS, VERSIONS[:1]))
def driver(request: pytest.FixtureRequest) -> Driver:
    return driver_of(request.param)


@cache
def on_cpu(kind: str) -> Built:
    (built,) = run_ranks(1, build, KINDS[kind], {}, {})
    return built


def experts(kind: str) -> bool:
    return any("expert" in name for name in KINDS[kind])


def has_parts(kind: str, driver: Driver, sizes: dict[str, int], **model: Any) -> None:
    ranks = sizes.get("tensor", 1) * sizes.get("pipeline", 1) * sizes.get("data", 1)
    found = driver.run_ranks(ranks, build, KINDS[kind], sizes, model)
    wanted = on_cpu(kind)
    for built in found:
        assert {"RMSNorm", "LayerNormLinear", "Linear", "DotProductAttention"} <= built.classes
        assert ("GroupedLinear" in built.classes) == experts(kind)
        assert built.optimizer == "transformer_engine.FusedAdam"
    assert max((built.exported for built in found), key=len) == wanted.exported
    joined = {key: shape for built in found for key, shape in built.keys.items()}
    vocabulary = {key for key in wanted.keys if "embedding" in key or "output_layer" in key}  # padded to the ranks
    assert joined.keys() == wanted.keys.keys()
    assert {k: v for k, v in joined.items() if k not in vocabulary} == {
        k: v for k, v in wanted.keys.items() if k not in vocabulary
    }


def test_every_family_is_built():
    assert {config["model_type"] for config in KINDS.values()} == set(FAMILIES)


# `make test` builds the other kinds in test_te_parity.py, where they are compared too.
@pytest.mark.parametrize("kind", varied(KINDS, ["llama", "mixtral", "deepseek_v3 with yarn"]))
def test_one_rank(kind: str, driver: Driver):
    has_parts(kind, driver, {})


@pytest.mark.parametrize("layout", varied(LAYOUTS, ["TP2"]))
@pytest.mark.parametrize("kind", varied(["qwen3", "qwen3_moe", "deepseek_v3", "mixtral"], ["mixtral"]))
def test_two_ranks(kind: str, layout: str, driver: Driver):
    if layout != "EP2" or experts(kind):
        has_parts(kind, driver, LAYOUTS[layout])


@pytest.mark.parametrize("layout", varied(ALL, ["TP2 EP2 DP2"]))
def test_four_ranks(layout: str, driver: Driver):
    has_parts("deepseek_v3", driver, ALL[layout])


@pytest.mark.exhaustive
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_and_bfloat16(recompute: str, driver: Driver):
    has_parts("qwen3_moe", driver, {}, dtype="bfloat16", recompute=recompute)


@pytest.mark.parametrize("recipe", varied(["tensorwise", "blockwise"], ["tensorwise"]))
def test_fp8(recipe: str, driver: Driver):
    has_parts("qwen3_moe", driver, {}, dtype="bfloat16", fp8="hybrid", fp8_recipe=recipe)


@pytest.mark.parametrize("recipe", varied(["tensorwise", "blockwise"], ["tensorwise"]))
def test_a_checkpoint_after_steps_in_fp8(recipe: str, driver: Driver, tmp_path: Path):
    """Transformer Engine 2.20.2 has no state for these recipes, and Megatron-Core's grouped layers took one for
    granted; 2.10.0 has one, which is saved and not read."""
    model = {"dtype": "bfloat16", "fp8": "e4m3", "fp8_recipe": recipe}
    (sizes,) = driver.run_ranks(1, save_after_fp8, KINDS["qwen3_moe"], {}, model, str(tmp_path))
    assert sizes and (sizes == {0}) == (driver is driver_of("2.20.2"))


def test_the_cpu_platform_does_not_see_the_package():
    """The folders are on no path, so that tests and demos on a CPU go on with Megatron's local layers."""
    assert all(folder_of(version).is_dir() for version in VERSIONS)
    assert importlib.util.find_spec("transformer_engine") is None
    assert on_cpu("qwen3").classes == set()


@pytest.mark.parametrize("apex", [True, False])
def test_weight_gradients_are_added_inside_kernels_where_apex_is_there(apex: bool, driver: Driver):
    assert driver.run_ranks(1, fuses_weight_gradients, KINDS["qwen3_moe"], {}, apex) == [{apex}]
