"""The figures of pretraining against arithmetic by hand, a slow rank of real processes, and goodput over restarts."""

import json
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.planning.flops import forward_operations, sampling_operations
from fiberpo_megatron.planning.shapes import read_shape
from fiberpo_megatron.telemetry.goodput import Goodput, Session, begin_session
from fiberpo_megatron.telemetry.gpu import GpuMonitor
from fiberpo_megatron.telemetry.throughput import Devices, Work, slowest, throughput
from fiberpo_megatron.trainer.expectation import peak_tflops
from fiberpo_megatron.trainer.figures import FACTS, PHASES, probe_seconds
from tests.telemetry.record_runs import batches, measured, straggling
from tests.trainer.test_loop import toy_config, training

QWEN = read_shape(read_object(Path("examples/planning/qwen3_30b_a3b/config.json")))


def test_operations_of_a_model_with_experts_are_those_of_its_active_parameters():
    """Qwen3-30B-A3B by hand: 48 layers, 32 heads of 128, 4 key-value heads, 8 of 128 experts of 768, a vocabulary of
    151,936 by 2,048. Norms and router are counted as parameters, 0.4 % of all."""
    attention = 2048 * 128 * (32 + 2 * 4) + 32 * 128 * 2048
    experts = 8 * 3 * 2048 * 768
    active = 48 * (attention + experts) + 151_936 * 2048
    pairs = 48 * 32 * (128 + 128)
    tokens = 1000
    by_hand = 2 * active * tokens + pairs * tokens**2
    assert forward_operations(QWEN, [tokens]) == pytest.approx(by_hand, rel=5e-3)
    assert QWEN.total > 9 * QWEN.active, "operations of experts that a token does not use would be nine times as many"


def test_attention_grows_with_the_square_of_a_trajectory_and_not_of_a_batch():
    one, two = forward_operations(QWEN, [500]), forward_operations(QWEN, np.array([500, 500]))
    assert two == 2 * one < forward_operations(QWEN, [1000])


def test_sampling_reads_a_prompt_once_for_its_group():
    prompts, lengths = [100, 100], [150, 200]
    both = forward_operations(QWEN, lengths)
    assert sampling_operations(QWEN, prompts, lengths, samples=1) == both
    assert sampling_operations(QWEN, prompts, lengths, samples=2) == pytest.approx(
        both - forward_operations(QWEN, [100])
    )


def test_rates_by_phase():
    work = Work({"train": 6e15, "old_log_probs": 2e15, "reference": 2e15, "generate": 1e15}, 12_000, 4_000)
    devices = Devices(training=8, engines=4, shared=False, peak_tflops=1000)
    seconds = {"seconds/train": 3.0, "seconds/old_log_probs": 1.0, "seconds/generate": 5.0, "seconds/total": 10.0}
    found = throughput(work, devices, seconds)
    assert found["tflops_per_gpu/train"] == 6e15 / 3 / 8 / 1e12 == 250 and found["mfu/train"] == 0.25
    assert found["tflops_per_gpu/generate"] == 50
    assert found["tflops_per_gpu/step"] == pytest.approx(11e15 / 10 / 12 / 1e12), "all devices, all useful operations"
    assert "tflops_per_gpu/reference" not in found, "it has not run"
    assert found["tokens_per_second_per_gpu/train"] == 500 and found["tokens_per_second_per_gpu/generate"] == 200
    assert found["idle_share"] == pytest.approx(0.6)
    shared = throughput(work, Devices(8, 8, True, None), seconds)
    assert shared["tflops_per_gpu/step"] == pytest.approx(11e15 / 10 / 8 / 1e12)
    assert not [name for name in shared if name.startswith("mfu")], "without a known peak there is no MFU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a row with its peak")
def test_a_cpu_has_no_peak():
    assert peak_tflops(toy_config()) is None


def test_the_slowest_rank_is_compared_with_its_peers():
    assert slowest("train", [1.0, 1.0, 1.5, 9.0], [0, 0, 0, 1]) == {
        "slowest/train/rank": 2.0, "slowest/train/excess_seconds": 0.5, "slowest/train/excess_share": 0.5
    }  # fmt: skip
    assert slowest("generate", [3.0, 0.0], [1, 0]) == {}, "a rank alone in its role has no peers"
    assert slowest("train", [0.0, 0.0], [0, 0]) == {}


def test_a_slow_rank_among_real_ones_is_found_although_all_take_the_same_time():
    late_s = 0.3  # far above the pauses of a busy machine, which make the peers late as well
    records = next(found for found in run_ranks(3, straggling, 1, 9, late_s) if found)
    late = records[4:]
    assert [one["slowest/train/rank"] for one in late] == [1.0] * len(late)
    assert median(one["slowest/train/excess_seconds"] for one in late) > 0.5 * late_s
    assert all(one["seconds/train"] > late_s for one in late), "the rank that writes the records waited as long"
    assert {"memory/host_peak_gib", "slowest/probe/rank", "disk/free_gib"} <= late[-1].keys()


def test_what_a_rank_sends_is_small():
    assert 4 * (len(PHASES) + len(FACTS)) < 100, "bytes of a rank and step"


def test_the_probe_takes_little():
    assert 0 < probe_seconds("cpu") < 1.0


def test_a_forward_pass_that_serves_twice_counts_once():
    """Half of the old log-probs' forward pass is that of training too, in the first of two epochs."""
    run, _ = training("grpo")
    rollouts = next(iter(batches()))
    seconds = {f"seconds/{name}": 1.0 for name in ("train", "old_log_probs")} | {"seconds/total": 4.0}
    figures = measured(run).figures
    twice, once = (figures(0, rollouts, seconds, kept) for kept in (0.0, 0.5))
    forward = twice["tflops_per_gpu/old_log_probs"]
    assert once["tflops_per_gpu/old_log_probs"] == forward
    assert twice["tflops_per_gpu/train"] == pytest.approx(6 * forward)
    assert once["tflops_per_gpu/train"] == pytest.approx(5.5 * forward)


A, B = Session(0, 100.0, 110.0), Session(3, 200.0, 220.0)


def trained(step: int, seconds: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "seconds/total": seconds}


def test_goodput_of_an_undisturbed_run():
    run = Goodput([A])
    assert run.step(0, 15.0, 115.0)["goodput"] == pytest.approx(5 / 15), "10 s of the first step were the set-up"
    assert run.step(1, 5.0, 120.0) == {"goodput": 0.5, "restart/count": 0.0, "restart/lost_seconds": 0}


def test_goodput_over_a_restart():
    """Steps 0 to 4 were done by 135; the restart goes on at step 3, so that steps 3 and 4 are lost."""
    past = [trained(0, 15.0), trained(1, 5.0), {"kind": "eval", "step": 1}, trained(2, 5.0)]
    run = Goodput([A, B], past)
    found = run.step(3, 25.0, 225.0)
    assert found["restart/count"] == 1 and found["restart/lost_seconds"] == 220 - (110 + 15)
    assert found["goodput"] == pytest.approx((15 + 5) / 125)
    later = Goodput([A, B, Session(4, 300.0, 310.0)], [*past, trained(3, 25.0)])
    assert later.lost == pytest.approx(95 + (310 - (220 + 5)))
    again = Goodput([A, B, Session(1, 300.0, 310.0)], past[:1])
    assert again.lost == pytest.approx((220 - (110 + 5)) + (310 - 220)), "the second start has no step that counts"


def test_sessions_are_kept_over_restarts_and_forgotten_by_a_fresh_run(tmp_path: Path):
    begin_session(tmp_path, A, fresh=True)
    (tmp_path / "sessions.jsonl").open("a").write("half a li")
    assert begin_session(tmp_path, B, fresh=False) == [A, B]
    assert begin_session(tmp_path, B, fresh=True) == [B]
    assert json.loads((tmp_path / "sessions.jsonl").read_text()) == {"step": 3, "began": 200.0, "ready": 220.0}


class Nvml:
    """Two GPUs: the first counts its energy, the second only says its power."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self) -> None:
        self.millijoules, self.milliwatts = 5_000_000, 100_000

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle == 1:
            raise self.NVMLError
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self.milliwatts


def test_energy_is_counted_and_else_integrated():
    nvml, now = Nvml(), SimpleNamespace(seconds=0.0)
    monitor = GpuMonitor(nvml, clock=lambda: now.seconds)
    assert monitor.energy() == 0.0, "what was used before is not the run's"
    nvml.millijoules, nvml.milliwatts, now.seconds = 5_003_000, 300_000, 10.0
    assert monitor.energy() == pytest.approx(3.0 + 0.5 * (100 + 300) * 10)
    nvml.millijoules = 0  # the driver was loaded again
    assert monitor.energy() == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_energy_of_a_real_gpu():
    monitor = GpuMonitor()
    assert monitor.energy() == 0.0
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        a = (a @ a).clamp(-1, 1)
    torch.cuda.synchronize()
    assert monitor.energy() > 0.0
    assert 0 < probe_seconds("cuda") < 0.05
