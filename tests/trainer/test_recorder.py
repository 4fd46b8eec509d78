"""The run folder as the trainer writes it: the report after the last step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.environments import Task
from fiberpo_megatron.telemetry.gpu import GpuMonitor
from fiberpo_megatron.telemetry.solve_rates import read_solve_rates
from fiberpo_megatron.trainer import run as run_module
from fiberpo_megatron.trainer.recorder import RunRecorder, sampled
from fiberpo_megatron.trainer.run import Run
from fiberpo_megatron.types import Completion, Prompt, RolloutGroup, Trajectory
from tests.trainer.toy import SingleLayout, TablePolicy


def finished_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run after its last step, whose weights are a table."""
    monkeypatch.setattr(run_module, "save_hf", lambda *arguments, **options: None)
    run = Run.__new__(Run)
    run.config = SimpleNamespace(run=SimpleNamespace(folder=folder), model=SimpleNamespace(path=folder))
    run.layout, run.policy = SingleLayout(), TablePolicy(1.0)
    return run


def test_a_run_ends_with_its_report(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path, monkeypatch)._finish()
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.html").mkdir()  # a file cannot take its name
    finished_run(tmp_path, monkeypatch)._finish()
    said = capsys.readouterr().out
    assert "WARNING: the report could not be written (" in said and "report.html" in said
    assert f"The run is complete; `fiberpo report {tmp_path}` writes the report" in said


def test_what_the_run_says_does_not_steer_a_terminal(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path, monkeypatch).say("a folder \x1b[2J\ud83d of that name")
    assert capsys.readouterr().out == "a folder \\x1b[2J\\ud83d of that name\n"


def test_samples_are_those_of_the_whole_step_and_the_same_prompts_of_every_evaluation():
    whole, shared = [[2, 2, 2, 2]], [[2, 2], [2, 2]]
    assert sampled(whole, 4, "train") == sampled(shared, 4, "train") == [0, 2, 4, 6]
    assert sampled(shared, 2, "eval") == [0, 4] and sampled([[2, 0], [3, 1]], 9, "eval") == [0, 2, 5]
    assert sampled([[2, 2], [0, 2]], 2, "eval") == [0]  # the third prompt's trajectories were dropped
    assert sampled([[1], []], 9, "train") == [0] and sampled([], 4, "eval") == []


class FirstOfTwo(SingleLayout):
    """The first of two data-parallel ranks; the second one's answers are given."""

    data_size = world_size = 2

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def gather_json(self, value: Any, root_only: bool = False) -> list[Any]:
        return [value, self.others.pop(0)]


def test_all_leaders_bring_their_share_of_the_samples(tmp_path):
    layout = FirstOfTwo([[[1, 0, 1], [1, 1, 1]], [{"trajectory": 2}, {"trajectory": 3}]])
    recorder = RunRecorder(tmp_path, layout, None, GpuMonitor(), ["d"], samples=9, kept=2)
    prompt = Prompt(0, 0, (1,), "p", Task("p", "a"))
    one = Trajectory(prompt, Completion((1,), np.zeros(1, np.float32), "stop", ()), "t", 0.0, False)
    recorder.rollouts(4, [RolloutGroup(prompt, (one, one))], "eval")
    lines = (tmp_path / "rollouts" / "eval_000004.jsonl").read_text().splitlines()
    assert [json.loads(line)["trajectory"] for line in lines] == [0, 2, 3]
    assert json.loads(lines[0])["response"] == "t"


def test_groups_of_a_filtered_step_stand_where_the_step_has_them(tmp_path):
    """The other rank has the groups 0 and 2; this one has 1, and 3 is a refill of its own."""
    layout = FirstOfTwo([[], [[0, 0, 2], [0, 2, 1]], []])
    recorder = RunRecorder(tmp_path, layout, None, GpuMonitor(), ["d"], samples=9, kept=2, solve_rates=True)
    prompt = Prompt(0, 0, (1,), "p", Task("p", "a", id="d/train/0"))
    one = Trajectory(prompt, Completion((1,), np.zeros(1, np.float32), "stop", ()), "t", 0.0, False)
    own = [RolloutGroup(prompt, (one,)), RolloutGroup(prompt, (one, one))]
    dropped = RolloutGroup(prompt, (one, one, one))
    recorder.rollouts(4, own, places=[1, 3], looked_at=[*own, dropped])
    lines = (tmp_path / "rollouts" / "step_000004.jsonl").read_text().splitlines()
    assert [json.loads(line)["trajectory"] for line in lines] == [2, 4, 5]
    assert [rate.samples for rate in read_solve_rates(tmp_path)] == [6]


def test_samples_that_cannot_be_written_do_not_end_the_run(tmp_path, caplog):
    """The rank that writes them would leave the others waiting in the next exchange."""
    recorder = RunRecorder(tmp_path, SingleLayout(), None, GpuMonitor(), ["d"], samples=1, kept=2)
    completion = Completion((1,), np.zeros(1, np.float32), "stop", ())
    prompt = Prompt(0, 0, (1,), "p", Task("p", "a"))
    group = RolloutGroup(prompt, (Trajectory(prompt, completion, "t", 0.0, False),))
    recorder.rollouts(1, [group])
    (tmp_path / "rollouts" / "step_000002.jsonl").mkdir()
    recorder.rollouts(2, [group])
    assert "the sample rollouts of step 2 are not written: [Errno 21] Is a directory" in caplog.text
    assert (tmp_path / "rollouts" / "step_000001.jsonl").is_file()
