"""The same log-probs, gradients and trained weights from a GPU's layers as from the CPU's.

`GpuPlatform` and its layer spec are as they are, and so are Transformer Engine's constructors; the arithmetic is
`te_emulation`'s. Both start from the same Hugging Face folder. The reference is one process of the CPU platform with
everything in one micro-batch; a layout packs rows of at most 72 tokens. What only a kernel can get wrong is not seen
here; wrong bounds, positions, cuts, splits, marks and recomputation are.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.certify.processes import run_ranks
from tests.distributed.parity import Case
from tests.distributed.test_parity import Whole, differences, join
from tests.gpu_ready import te_parity
from tests.gpu_ready.te_ranks import driver_of
from tests.gpu_ready.te_stub import VERSIONS
from tests.variations import varied

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
"""float32 has 24 bits: a sum in another order moves a log-prob or a tensor's largest element by up to about 1e-6."""

DENSE = [Case("dense", distributed_optimizer=True), Case("dense tied")]
EXPERTS = [Case("moe", distributed_optimizer=True), Case("deepseek fused")]
LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "CP2": {"context": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"data": 2, "expert": 2},
    "TP2 CP2": {"tensor": 2, "context": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "CP2 EP2": {"context": 2, "expert": 2},
    "TP2 EP2 ETP2": {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2},
}
KEPT = ("TP2", "CP2", "PP2", "EP2")
RECOMPUTED = [
    {"recompute": "full"},
    {"recompute": "selective"},
    {"recompute": "selective", "recompute_modules": ["core_attn", "moe_act", "layernorm"]},
    {"recompute": "selective", "recompute_modules": ["moe"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    run_ranks(1, te_parity.write_checkpoints, path)
    return path


@cache
def _reference(folder: Path, model: str) -> Whole:
    (runs,) = run_ranks(1, te_parity.run_cases, [Case(model, budget=None)], folder, {})
    return join(runs)


def on_gpu_layers(
    cases: list[Case],
    layout: str,
    folder: Path,
    run: Callable[..., Any] = te_parity.run_cases,
    version: str = VERSIONS[0],
) -> list[dict[str, float]]:
    """The largest differences from the CPU's layers, for each case."""
    sizes = LAYOUTS[layout]
    ranks = int(np.prod([sizes.get(name, 1) for name in ("tensor", "pipeline", "context", "data")]))
    found = driver_of(version).run_ranks(ranks, run, cases, folder, sizes)
    joined = [join(list(runs)) for runs in zip(*found)]
    return [differences(whole, _reference(folder, case.model)) for case, whole in zip(cases, joined)]


def assert_same(cases: list[Case], layout: str, folder: Path, **how: Any) -> None:
    for case, worst in zip(cases, on_gpu_layers(cases, layout, folder, **how)):
        print(layout, case.model, {name: f"{value:.1e}" for name, value in worst.items()})
        too_far = {name: value for name, value in worst.items() if not value < TOLERANCE}
        assert not too_far, f"{layout}, {case}: {too_far}"


@pytest.mark.parametrize("layout", varied(LAYOUTS, KEPT))
def test_layers_of_a_gpu(layout: str, folder: Path):
    cases = EXPERTS + ([] if "expert" in LAYOUTS[layout] else DENSE)
    assert_same(cases, layout, folder)


@pytest.mark.parametrize("layout", varied(["one rank", "TP2", "CP2"], ["CP2"]))
def test_rotary_embeddings(layout: str, folder: Path):
    """The CPU scales YaRN's cosines and sines; on a GPU the scores of ordinary attention are scaled in their place.
    "deepseek" has sizes that the fused kernel does not take."""
    assert_same([Case("dense yarn"), Case("deepseek yarn"), Case("deepseek")], layout, folder)


@pytest.mark.parametrize("layout", varied(["TP2", "CP2"], ["TP2"]))
def test_recomputation(layout: str, folder: Path):
    assert_same([Case("moe", options=options) for options in RECOMPUTED], layout, folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["one rank", "TP2", "CP2", "EP2"])
def test_the_older_version(layout: str, folder: Path):
    assert_same(EXPERTS, layout, folder, version=VERSIONS[1])


def test_the_comparison_sees_lost_bounds_and_a_lost_scale(folder: Path):
    (joined,) = on_gpu_layers([Case("dense")], "one rank", folder, te_parity.run_as_one_sequence)
    assert joined["log_probs"] > 0.01
    (unscaled,) = on_gpu_layers([Case("dense yarn")], "one rank", folder, te_parity.run_with_plain_scores)
    assert unscaled["log_probs"] > 1e-4


@pytest.mark.exhaustive
def test_the_emulated_kernels_of_latent_attention_are_those_of_triton():
    command = [sys.executable, "-m", "tests.gpu_ready.te_kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-6
