"""Every patch of the CPU platform is needed: leave it out, and the scenario that passes with it fails."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from fiberpo_megatron.certify.processes import collect_ranks, run_ranks
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


def gather_in_flight(left_out: str | None, seconds: float) -> int:
    """Gather parts of many buckets at the same time, again and again, and return how often."""
    patches.install()
    if left_out is not None:
        patches.leave_out(left_out)
    dist.init_process_group("gloo")
    buckets = [[torch.zeros(2000) for _ in range(2)] for _ in range(12)]
    end, rounds = time.monotonic() + seconds, 0
    going = torch.ones(())
    while going:
        rounds += 1
        sent = []
        for bucket in buckets:
            with _coalescing_manager(async_ops=True) as work:
                for whole in bucket:
                    own = whole.chunk(2)[dist.get_rank()].fill_(10 * dist.get_rank() + rounds)
                    dist.all_gather_single(whole, own, async_op=True)
            sent.append(work)
        for work, bucket in zip(sent, buckets, strict=True):
            work.wait()
            assert all(whole[0] == rounds and whole[-1] == 10 + rounds for whole in bucket)
        going.fill_(time.monotonic() < end)
        dist.broadcast(going, 0)
    return rounds


def test_table_is_tested():
    assert {*SCENARIOS, "gather_separately"} == {patch.name for patch in patches.PATCHES}
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


def test_gathers_in_flight_do_no_harm():
    assert min(run_ranks(2, gather_in_flight, None, 1.0)) > 1


@pytest.mark.exhaustive
def test_gathers_in_flight_without_the_patch():
    """It takes 2 s on free cores until the process crashes, and up to a minute on busy ones."""
    outcomes = collect_ranks(2, gather_in_flight, "gather_separately", 120.0)
    assert any("SIG" in str(outcome.error) for outcome in outcomes)
