"""The file of a calibration: its format, what is refused, and that a plan uses every constant in it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.mcore.families import read_hf_config
from fiberpo_megatron.planning.calibration import Calibration, Constant, calibrated, read_calibration, vendor_row
from fiberpo_megatron.planning.estimate import Plan, make_plan
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.timing import StepTime

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/demo/model"
CONSTANTS = {
    "device.memory_gb": 16.0,
    "device.float32_tflops": 0.05,
    "device.bfloat16_tflops": 0.01,
    "device.memory_gb_per_s": 10.0,
    "device.link_gb_per_s": 0.5,
    "assumptions.nvlink_efficiency": 1.0,
    "assumptions.nvlink_latency_us": 500.0,
    "assumptions.matmul_efficiency": 0.7,
    "assumptions.expert_matmul_efficiency": 0.5,
    "assumptions.attention_efficiency": 0.5,
    "assumptions.memory_efficiency": 0.6,
    "assumptions.train_kernel_us": 1e-6,
    "assumptions.pass_s": 0.01,
    "assumptions.layer_s": 0.02,
    "assumptions.backward_pass_s": 0.01,
    "assumptions.backward_layer_s": 0.03,
    "assumptions.optimizer_s": 0.005,
    "assumptions.optimizer_layer_s": 0.004,
    "assumptions.publish_s": 0.05,
    "assumptions.publish_layer_s": 0.005,
    "assumptions.checkpoint_s": 0.2,
    "assumptions.checkpoint_layer_s": 0.1,
    "assumptions.decode_memory_efficiency": 0.7,
    "assumptions.expert_memory_efficiency": 0.6,
    "assumptions.decode_kernel_us": 1e-6,
    "assumptions.engine_step_ms": 15.0,
    "assumptions.engine_request_us": 700.0,
    "assumptions.prefill_efficiency": 0.1,
    "assumptions.generate_s": 0.02,
    "assumptions.response_s": 0.003,
    "assumptions.trajectory_ms": 0.3,
}
"""What a calibration of a CPU with two ranks measures."""
PHASES = {
    "memory_efficiency": {"old_log_probs", "train", "optimizer"},
    "pass_s": {"old_log_probs", "train", "publish"},
    "layer_s": {"old_log_probs", "train", "publish"},
    "backward_pass_s": {"train"},
    "backward_layer_s": {"train"},
    "optimizer_s": {"optimizer"},
    "optimizer_layer_s": {"optimizer"},
    "publish_s": {"publish"},
    "publish_layer_s": {"publish"},
    "checkpoint_s": {"checkpoint"},
    "checkpoint_layer_s": {"checkpoint"},
    "engine_step_ms": {"generate"},
    "engine_request_us": {"generate"},
    "prefill_efficiency": {"generate"},
    "generate_s": {"generate", "publish"},
    "response_s": {"generate"},
    "trajectory_ms": {"host"},
}
"""Phases that a constant moves, and no other."""


def calibration(**changed: float) -> Calibration:
    values = CONSTANTS | changed
    constants = {name: Constant(value, value, value, "") for name, value in values.items()}
    return Calibration({"device": "cpu", "ranks": 2}, {"torch": "2"}, "2026-01-01T00:00:00+00:00", constants, {})


def demo(*overrides: str) -> Config:
    return load_config(ROOT / "examples/demo/train.toml", ["--model.path", str(MODEL), *overrides])


def plan(found: Calibration, *overrides: str) -> Plan:
    config = demo(*overrides)
    gpu = found.gpu(config.model.dtype)
    assumptions = calibrated(found, ["prompt_tokens=6", "response_share=0.8"])
    return make_plan(config, read_hf_config(MODEL, None), 3, gpu.memory_gb * 1e9, gpu, assumptions)


def moved(before: StepTime, after: StepTime) -> set[str]:
    return {name for name, seconds in asdict(before).items() if seconds != getattr(after, name)}


@pytest.mark.parametrize("name", [name for name in CONSTANTS if name != "device.memory_gb"])
def test_a_plan_uses_every_constant(name: str):
    overrides = ("--model.dtype", "bfloat16") if "bfloat16" in name else ()
    # floors are set so low that other costs take their place: only a large value shows
    other = CONSTANTS[name] * (1e12 if CONSTANTS[name] < 1e-5 else 0.5)
    before, after = plan(calibration(), *overrides), plan(calibration(**{name: other}), *overrides)
    seen = moved(before.time, after.time)
    assert seen
    assert seen == PHASES.get(name.removeprefix("assumptions."), seen)


def test_a_cpu_is_planned_from_what_was_measured():
    found = plan(calibration())
    assert found.gpu.name == "cpu" and found.memory == 16e9 and found.engine_gpus == 1
    rows, steps, layers = found.work.micro_batches, found.work.optimiser_steps, 4
    assert (rows, steps) == (1, 4)
    assert found.time.train > steps * rows * (0.02 + layers * 0.05)
    assert found.time.checkpoint == pytest.approx(0.2 + layers * 0.1, rel=0.1)
    # 256 responses, each of 5 tokens, decoded together
    assert found.time.generate == pytest.approx(0.02 + 256 * 0.003 + 4.8 * (0.015 + 256 * 0.0007), rel=0.15)


def test_what_is_assumed_by_hand_comes_before_what_was_measured():
    assert calibrated(calibration(), []).engine_step_ms == 15.0
    assert calibrated(calibration(), ["engine_step_ms=3"]).engine_step_ms == 3.0
    assert calibrated(None, []) == Assumptions()
    with pytest.raises(ValueError, match="--assume speed=1"):
        calibrated(calibration(), ["speed=1"])


def test_devices_are_known_by_their_own_names():
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA GB200": "GB200",
        "NVIDIA B200": "B200",
        "NVIDIA A100-SXM4-80GB": "A100",
        "AMD Instinct MI300X": "MI300X",
    }
    assert {name: row.name for name in names if (row := vendor_row(name))} == names
    assert vendor_row("cpu") is None


def test_a_gpu_keeps_the_vendors_figures_for_what_was_not_measured():
    found = replace(calibration(), machine={"device": "NVIDIA H100 80GB HBM3"})
    row = found.gpu("bfloat16")
    assert (row.name, row.tflops, row.memory_gb_per_s, row.nvlink_gb_per_s) == ("H100", 0.01, 10.0, 0.5)
    assert (row.network_gb_per_s, row.nvlink_domain, row.host_gb_per_s) == (50, 8, 64)


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    calibration().write(tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == calibration()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format="other"), "format is 'other'"),
        (lambda values: values.pop("constants"), "KeyError: 'constants'"),
        (lambda values: values["constants"].update({"device.speed": values["constants"]["device.memory_gb"]}), "speed"),
        (lambda values: values["constants"].pop("device.memory_gb_per_s"), "device.memory_gb_per_s is missing"),
        (lambda values: values["constants"]["assumptions.layer_s"].update(value=-1.0), "layer_s = -1.0 is not between"),
        (lambda values: values["constants"]["assumptions.memory_efficiency"].update(value=2.0), "= 2.0 is not between"),
        (lambda values: values["constants"]["assumptions.layer_s"].pop("low"), "KeyError: 'low'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, change, message: str):
    path = tmp_path / "c.json"
    calibration().write(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        read_calibration(path)
    assert str(path) in str(error.value)


def test_the_command_plans_with_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "c.json"
    calibration().write(path)
    words = ["plan", str(ROOT / "examples/demo/train.toml"), "--model.path", str(MODEL), "--gpus", "3"]
    assert main([*words, "--calibration", str(path), "--json"]) == 0
    slow = json.loads(capsys.readouterr().out)["seconds"]["total"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"]["total"] < slow  # on an H100
    assert main([*words, "--calibration", str(path), "--gpu", "H100"]) == 2
    assert "was measured on cpu; leave --gpu out" in capsys.readouterr().err
    assert main([*words, "--calibration", str(tmp_path / "none.json")]) == 2
    assert "it cannot be read" in capsys.readouterr().err
