"""What a run expects of itself: the lines at its start, seconds beside those of every step, and never an error."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.mcore.families import read_hf_config
from fiberpo_megatron.telemetry.report.page import plan_section
from fiberpo_megatron.telemetry.report.run_data import load_run
from fiberpo_megatron.telemetry.sinks import JsonlSink
from fiberpo_megatron.trainer import expectation as module
from fiberpo_megatron.trainer.expectation import announced, calibration_file, expectation, nothing_expected
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.types import RolloutBatch
from tests.planning.test_calibration import MODEL, calibration, demo
from tests.trainer.test_loop import training
from tests.trainer.toy import SingleLayout

HF_CONFIG = read_hf_config(MODEL, None)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The demo's config with a calibration."""
    calibration().write(tmp_path / "measured.json")
    overrides = ("--planning.calibration", str(tmp_path / "measured.json"), "--run.folder", str(tmp_path / "run"))
    return demo(*overrides, "--planning.assume", '["response_share=0.5"]')


def one_rank(config: Config) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert": 1})})


def rollouts(*responses: int, prompt: int = 6) -> RolloutBatch:
    """One group of trajectories with these response lengths."""
    lengths = np.array(responses) + prompt
    mask = np.concatenate([[False] * prompt + [True] * count for count in responses])
    return RolloutBatch.filled(
        tokens=np.ones(len(mask)), response_mask=mask, lengths=lengths, groups=np.zeros(len(lengths))
    )


def test_a_run_says_what_it_expects(config: Config):
    said: list[str] = []
    found = announced(one_rank(config), HF_CONFIG, SingleLayout(), lambda: 6.0, said.append)
    assert said[0].startswith("Plan (calibration of 2026-01-01): a step takes ")
    assert "generate " in said[0] and "old log probs " in said[0] and "checkpoint " in said[0]
    assert "on each of 2 ranks and engines, if prompts have 6 tokens and responses 3 of 6" in said[1]
    assert "memory of a training rank: at most" in said[2] and len(said) == 3
    metrics = found(rollouts(3, 3, 3, 3))
    seconds = {name: value for name, value in metrics.items() if name.startswith("planned/seconds/")}
    total = seconds.pop("planned/seconds/total")
    assert sum(seconds.values()) == pytest.approx(total)
    assert {name.split("/")[2] for name in seconds} == {
        *("generate", "old_log_probs", "train", "publish", "host", "checkpoint")
    }
    assert metrics["planned/tokens_per_second"] == pytest.approx(32 * 8 * 9 / total)


def test_expected_seconds_follow_the_trajectories_and_planned_ones_do_not(config: Config):
    found = expectation(config, HF_CONFIG, 2, 6.0)
    short, long = found(rollouts(*[2] * 256)), found(rollouts(*[60] * 256))
    changed = {name for name in short if short[name] != long[name]}
    assert all(name.startswith("expected/") for name in changed)
    assert long["expected/seconds/generate"] > 5 * short["expected/seconds/generate"]
    assert long["expected/seconds/train"] > short["expected/seconds/train"]
    assert short["expected/seconds/checkpoint"] == long["expected/seconds/checkpoint"]
    few = found(rollouts(*[60] * 32))
    assert few["expected/seconds/generate"] < long["expected/seconds/generate"]


def test_a_few_long_responses_cost_a_generation_more_than_their_tokens(config: Config):
    found = expectation(config, HF_CONFIG, 2, 6.0)
    even, uneven = found(rollouts(*[20] * 64)), found(rollouts(*[10] * 62, 330, 330))
    assert uneven["expected/seconds/generate"] > 3 * even["expected/seconds/generate"]
    assert uneven["expected/seconds/generate"] > 330 * 0.015  # the steps of the longest alone


def test_replayed_steps_neither_generate_nor_publish(config: Config, tmp_path: Path):
    storage = config.storage.model_copy(update={"replay": tmp_path})
    found = expectation(config.model_copy(update={"storage": storage}), HF_CONFIG, 2, 6.0)
    names = set(found(rollouts(3, 4)))
    assert "expected/seconds/train" in names
    assert not names & {"expected/seconds/generate", "expected/seconds/publish"}


def test_without_a_calibration_one_line_says_how_to_make_one(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[str] = []
    planning = config.planning.model_copy(update={"calibration": None})
    found = announced(
        config.model_copy(update={"planning": planning}), HF_CONFIG, SingleLayout(), lambda: 6.0, said.append
    )
    assert found is nothing_expected and found(rollouts(3)) == {}
    (line,) = said
    assert line.startswith("No plan: nothing is known about the speed of this machine (cpu). `fiberpo calibrate ")


def test_a_gpu_is_known_by_its_name(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    planning = config.planning.model_copy(update={"calibration": None})
    found = expectation(config.model_copy(update={"planning": planning}), HF_CONFIG, 2, 6.0)
    assert found.lines()[0].startswith("Plan (H100, vendor's figures): a step takes ")
    with pytest.raises(ValueError, match=r"was measured on cpu, but this machine has NVIDIA H100"):
        expectation(config, HF_CONFIG, 2, 6.0)


def test_a_calibration_beside_the_run_is_found(config: Config, tmp_path: Path):
    planning = config.planning.model_copy(update={"calibration": None})
    config = config.model_copy(update={"planning": planning})
    assert calibration_file(config) is None
    calibration().write(tmp_path / "calibration.json")
    assert calibration_file(config) == tmp_path / "calibration.json"
    (tmp_path / "run").mkdir()
    calibration().write(tmp_path / "run/calibration.json")
    assert calibration_file(config) == tmp_path / "run/calibration.json"


@pytest.mark.parametrize("broken", ["not JSON", '{"format": "other"}'])
def test_a_plan_that_cannot_be_made_is_one_warning(config: Config, tmp_path: Path, broken: str):
    (tmp_path / "measured.json").write_text(broken)
    said: list[str] = []
    assert announced(config, HF_CONFIG, SingleLayout(), lambda: 6.0, said.append) is nothing_expected
    assert len(said) == 1 and said[0].startswith("WARNING: no plan of this run could be made (ValueError: ")


def test_prompts_that_cannot_be_read_leave_the_assumed_length(config: Config, caplog: pytest.LogCaptureFixture):
    def fails() -> float:
        raise OSError("gone")

    said: list[str] = []
    announced(one_rank(config), HF_CONFIG, SingleLayout(), fails, said.append)
    assert "if prompts have 256 tokens" in said[1]
    assert "the prompts of the next step cannot be read for the plan: gone" in caplog.text


def test_a_plan_that_fails_in_a_step_is_one_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    found = expectation(config, HF_CONFIG, 2, 6.0)

    def fails(*arguments: Any) -> None:
        raise ArithmeticError("no such step")

    monkeypatch.setattr(module, "step_time", fails)
    assert found(rollouts(3)) == {} and found(rollouts(3)) == {}
    assert caplog.text.count("what a step should take is not known any more (ArithmeticError: no such step)") == 1


def test_ranks_that_do_not_log_expect_nothing(config: Config):
    layout = SimpleNamespace(rank=1, is_logger=False, share_text=lambda text: "6.0")
    assert announced(config, HF_CONFIG, layout, lambda: 1 / 0, print) is nothing_expected  # type: ignore[arg-type]


def test_a_toy_run_records_its_plan_beside_every_step_and_reports_it(config: Config, tmp_path: Path):
    run, memory = training("grpo")
    expected = expectation(config, HF_CONFIG, 2, 1.0)
    run = type(run)(**{**vars(run), "expected": expected})
    train(run)
    records = [metrics for kind, _, metrics in memory.records if kind == "train"]
    assert len(records) == 3
    for record in records:
        assert record["expected/seconds/generate"] > 0 and record["seconds/generate"] > 0
        assert record["expected/seconds/total"] != record["planned/seconds/total"]  # 96 trajectories, not 256
    sink = JsonlSink(tmp_path / "run/metrics.jsonl")
    for kind, step, metrics in memory.records:
        sink.write(step, kind, metrics)  # type: ignore[arg-type]
    sink.close()
    page = plan_section(load_run(tmp_path / "run"))
    assert "<h2>Plan</h2>" in page and "mean of 2 steps" in page
    assert "planned before the start" in page and "expected with these trajectories" in page
    assert "Furthest from its plan is " in page  # a table of 8 x 8 numbers is no mixture of experts
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])["expected/seconds/train"] > 0
