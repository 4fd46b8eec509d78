import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fiberpo_megatron import durable
from fiberpo_megatron.environments import Task
from fiberpo_megatron.telemetry.rollout_log import (
    EVALUATIONS,
    ROLLOUTS,
    stored_rollouts,
    trajectory_record,
    write_records,
)
from fiberpo_megatron.telemetry.step_files import spread
from fiberpo_megatron.types import Branch, Completion, Prompt, Trajectory, WeightSpan


def write_rollouts(
    folder: Path, step: int, trajectories: Sequence[Trajectory], *, count: int, domains: Sequence[str], keep: int
) -> Path | None:
    """Write `count` of the trajectories, spread evenly, as a run does."""
    chosen = spread(count, len(trajectories))
    records = [trajectory_record(step, at, trajectories[at], domains) for at in chosen]
    return write_records(folder, step, records, keep=keep)


def trajectories(index: int, count: int = 4) -> list[Trajectory]:
    prompt = Prompt(index, 0, (5, 6), f"<p {index}>", Task("unused", "092", id=f"addition/{index}"))
    log_probs = np.array([-0.123456789, -2.0], np.float32)
    return [
        Trajectory(prompt, Completion((7, 1), log_probs, "stop", (WeightSpan("3", 0, 2),)), f"r{i}", 1.0, True)
        for i in range(count)
    ]


def test_a_few_trajectories_are_spread_over_the_step(tmp_path):
    path = write_rollouts(
        tmp_path, 12, [t for i in range(8) for t in trajectories(i)], count=4, domains=["addition"], keep=9
    )
    assert path == ROLLOUTS.path(tmp_path, 12) == tmp_path / "rollouts" / "step_000012.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["index"] for r in records] == [0, 2, 4, 6]
    assert [r["trajectory"] for r in records] == [0, 8, 16, 24]
    assert records[0] == {
        "step": 12,
        "trajectory": 0,
        "domain": "addition",
        "index": 0,
        "id": "addition/0",
        "prompt": "<p 0>",
        "response": "r0",
        "answer": "092",
        "reward": 1.0,
        "correct": True,
        "finish_reason": "stop",
        "weight_versions": [["3", 0, 2]],
        "token_ids": [7, 1],
        "log_probs": [-0.12346, -2.0],
    }


def test_a_repeated_step_replaces_its_file_and_nothing_writes_nothing(tmp_path):
    write_rollouts(tmp_path, 1, trajectories(0), count=4, domains=["addition"], keep=9)
    write_rollouts(tmp_path, 1, trajectories(1), count=1, domains=["addition"], keep=9)
    lines = ROLLOUTS.path(tmp_path, 1).read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["index"] == 1
    assert write_rollouts(tmp_path, 2, trajectories(0), count=0, domains=["addition"], keep=9) is None
    assert write_rollouts(tmp_path, 2, [], count=4, domains=["addition"], keep=9) is None
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["step_000001.jsonl"]


def test_a_conversation_says_which_tokens_were_sampled(tmp_path):
    prompt = Prompt(0, 0, (5, 6), "p", Task("p", "8"))
    completion = Completion((7, 9, 8), np.zeros(3, np.float32), "stop", (), loss_mask=np.array([True, False, True]))
    path = write_rollouts(tmp_path, 0, [Trajectory(prompt, completion, "7", 1.0, True)], count=1, domains=["d"], keep=9)
    assert json.loads(path.read_text())["loss_mask"] == [1, 0, 1]


def test_what_the_environment_said_is_written_where_it_said_something(tmp_path):
    task = Task([{"role": "user", "content": "p"}], answer={"value": 8}, metadata={"level": 3}, id="x")
    trajectory = replace(
        trajectories(0)[0],
        prompt=Prompt(0, 0, (5, 6), "p", task),
        rewards={"format": 0.5},
        metrics={"calls": 2.0},
        failure="deadline: it took too long",
    )
    path = write_rollouts(tmp_path, 0, [trajectory], count=1, domains=["d"], keep=9)
    record = json.loads(path.read_text())
    assert record["metadata"] == {"level": 3} and record["answer"] == {"value": 8} and record["id"] == "x"
    assert record["rewards"] == {"format": 0.5} and record["metrics"] == {"calls": 2.0}
    assert record["failure"] == "deadline: it took too long"


def test_a_run_keeps_so_many_steps(tmp_path):
    """The newest half stays whole; the older steps are spread over the run, its first step among them."""
    (tmp_path / "rollouts").mkdir()
    for step in range(1000):
        ROLLOUTS.path(tmp_path, step).touch()
        ROLLOUTS.prune(tmp_path, 20)
        kept = [step for step, _ in stored_rollouts(tmp_path)[0]]
        assert len(kept) == min(step + 1, 20) or 12 <= len(kept) <= 20
        assert kept[0] == 0 and kept[-10:] == list(range(max(0, step - 9), step + 1))[-len(kept) :]
    old = kept[:-10]
    assert len(old) >= 3 and max(np.diff(old)) <= 1000 / 3, old


def test_files_of_an_earlier_version_are_thinned_out_at_once_and_others_are_left_alone(tmp_path):
    for step in range(50):
        write_rollouts(tmp_path, step, trajectories(0), count=1, domains=["addition"], keep=100)
    (tmp_path / "rollouts" / "notes.txt").touch()
    (tmp_path / "rollouts" / "step_000003").mkdir()
    EVALUATIONS.path(tmp_path, 20).touch()
    write_rollouts(tmp_path, 50, trajectories(0), count=1, domains=["addition"], keep=4)
    files, odd = stored_rollouts(tmp_path)
    assert [step for step, _ in files] == [0, 32, 49, 50] and odd == ["notes.txt", "step_000003"]
    assert [step for step, _ in EVALUATIONS.stored(tmp_path)[0]] == [20]


def test_evaluations_have_files_of_their_own(tmp_path):
    for step in range(0, 60, 10):
        records = [trajectory_record(step, 3, trajectories(3)[0], ["addition"])]
        write_records(tmp_path, step, records, keep=4, files=EVALUATIONS)
    assert [step for step, _ in EVALUATIONS.stored(tmp_path)[0]] == [0, 20, 40, 50]
    record = json.loads((tmp_path / "rollouts" / "eval_000050.jsonl").read_text())
    assert record["step"] == 50 and record["trajectory"] == 3 and record["response"] == "r0"
    assert stored_rollouts(tmp_path) == ([], [])


def test_a_file_is_whole_and_its_name_lasts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(durable, "sync", synced.append)
    path = write_rollouts(tmp_path, 1, trajectories(0), count=4, domains=["addition"], keep=9)
    assert synced == [path.parent] and os.listdir(path.parent) == ["step_000001.jsonl"]


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_rollouts(tmp_path, 1, trajectories(0), count=4, domains=["addition"], keep=9)
    assert os.listdir(tmp_path / "rollouts") == []


def test_files_that_vanish_meanwhile_are_no_error(tmp_path, monkeypatch):
    for step in range(8):
        write_rollouts(tmp_path, step, trajectories(0), count=1, domains=["addition"], keep=100)
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (unlink(path), unlink(path, **options))[1])
    ROLLOUTS.prune(tmp_path, 4)
    assert [step for step, _ in stored_rollouts(tmp_path)[0]] == [0, 4, 6, 7]


def test_branches_are_written_with_their_prompts():
    (plain,) = trajectories(0, 1)
    completion = Completion((9, 8), np.zeros(2, np.float32), "length", (), loss_mask=np.array([False, True]))
    record = trajectory_record(0, 0, replace(plain, branches=(Branch((5, 7), completion),)), ["addition"])
    (branch,) = record["branches"]
    assert branch["prompt_ids"] == [5, 7] and branch["token_ids"] == [9, 8] and branch["loss_mask"] == [0, 1]
    assert branch["finish_reason"] == "length" and record["finish_reason"] == "stop"
    assert "branches" not in trajectory_record(0, 0, plain, ["addition"])
