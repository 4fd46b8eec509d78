"""Every patch of the CPU platform is needed: leave it out, and the scenario that passes with it fails."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fiberpo_megatron.certify.processes import collect_ranks
from fiberpo_megatron.mcore.cpu import patches
from tests.distributed.parity import (
    DEEPSEEK_V3,
    QWEN3_MOE,
    TEMPERATURE,
    fixed_gate,
    make_batch,
    make_config,
    micro_batches_for,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is not installed")

MODEL = {**QWEN3_MOE, "num_hidden_layers": 2}
LATENT = {**DEEPSEEK_V3, "num_hidden_layers": 2}
SCENARIOS = {
    # patch: (world size, parallel section)
    "current_device": (1, {}),
    "cuda_literals": (1, {}),
    "cuda_type_names": (1, {}),
    "random_state": (1, {}),
    "streams": (1, {}),
    "synchronize": (2, {"pipeline": 2}),
    "router_without_transformer_engine": (1, {}),
    "recompute_without_transformer_engine": (1, {}),
    "dispatcher_splits": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "uneven_gloo": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "latent_attention_without_transformer_engine": (1, {}),
}


def train_and_resume(left_out: str | None, parallel: dict[str, int], folder: str, model: dict[str, Any]) -> float:
    """One optimiser step, a checkpoint, and the next step after loading it into a new policy."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy

    if left_out is not None:
        patches.leave_out(left_out)
    config = make_config(parallel=parallel, model={"recompute": "selective", "recompute_modules": ["layernorm"]})
    layout = start_layout(model, config.parallel, config.run)
    batches = micro_batches_for(make_batch(), layout, 128)
    gate = fixed_gate(batches, 200)
    policy = build_policy(config, model, layout)
    policy.step(batches, gate, TEMPERATURE)
    policy.save(folder, {"step": 1})
    expected = policy.step(batches, gate, TEMPERATURE).gradient_norm
    resumed = build_policy(config, model, layout)
    assert resumed.load(folder)["step"] == 1
    found = resumed.step(batches, gate, TEMPERATURE).gradient_norm
    assert abs(found - expected) < 1e-6 * expected
    return found


def test_table_is_tested():
    assert set(SCENARIOS) == {patch.name for patch in patches.PATCHES}
    assert all(patch.reason for patch in patches.PATCHES)


@pytest.mark.parametrize(
    "world_size, parallel, model",
    [
        (1, {}, MODEL),
        (2, {"pipeline": 2}, MODEL),
        (2, {"tensor": 2, "expert_tensor": 2}, MODEL),
        (*SCENARIOS["dispatcher_splits"], MODEL),
        (2, {"tensor": 2}, LATENT),
    ],
)
def test_with_all_patches(world_size: int, parallel: dict[str, int], model: dict[str, Any], tmp_path: Path):
    outcomes = collect_ranks(world_size, train_and_resume, None, parallel, str(tmp_path / "c"), model)
    assert [outcome.error for outcome in outcomes] == [None] * world_size, outcomes[0].trace


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_without(name: str, tmp_path: Path):
    world_size, parallel = SCENARIOS[name]
    model = LATENT if name.startswith("latent") else MODEL
    outcomes = collect_ranks(world_size, train_and_resume, name, parallel, str(tmp_path / "c"), model, timeout_s=60)
    assert any(outcome.error for outcome in outcomes)
