import json
from dataclasses import replace

import numpy as np

from fiberpo_megatron.environments import Task
from fiberpo_megatron.telemetry.rollout_log import rollout_path, write_rollouts
from fiberpo_megatron.types import Completion, Prompt, Trajectory, WeightSpan


def trajectories(index: int, count: int = 4) -> list[Trajectory]:
    prompt = Prompt(index, 0, (5, 6), f"<p {index}>", Task("unused", "092", id=f"addition/{index}"))
    log_probs = np.array([-0.123456789, -2.0], np.float32)
    return [
        Trajectory(prompt, Completion((7, 1), log_probs, "stop", (WeightSpan("3", 0, 2),)), f"r{i}", 1.0, True)
        for i in range(count)
    ]


def test_a_few_trajectories_are_spread_over_the_step(tmp_path):
    path = write_rollouts(tmp_path, 12, [t for i in range(8) for t in trajectories(i)], count=4, domains=["addition"])
    assert path == rollout_path(tmp_path, 12) == tmp_path / "rollouts" / "step_000012.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["index"] for r in records] == [0, 2, 4, 6]
    assert records[0] == {
        "step": 12,
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
    write_rollouts(tmp_path, 1, trajectories(0), count=4, domains=["addition"])
    write_rollouts(tmp_path, 1, trajectories(1), count=1, domains=["addition"])
    lines = rollout_path(tmp_path, 1).read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["index"] == 1
    assert write_rollouts(tmp_path, 2, trajectories(0), count=0, domains=["addition"]) is None
    assert write_rollouts(tmp_path, 2, [], count=4, domains=["addition"]) is None
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["step_000001.jsonl"]


def test_a_conversation_says_which_tokens_were_sampled(tmp_path):
    prompt = Prompt(0, 0, (5, 6), "p", Task("p", "8"))
    completion = Completion((7, 9, 8), np.zeros(3, np.float32), "stop", (), loss_mask=np.array([True, False, True]))
    path = write_rollouts(tmp_path, 0, [Trajectory(prompt, completion, "7", 1.0, True)], count=1, domains=["d"])
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
    path = write_rollouts(tmp_path, 0, [trajectory], count=1, domains=["d"])
    record = json.loads(path.read_text())
    assert record["metadata"] == {"level": 3} and record["answer"] == {"value": 8} and record["id"] == "x"
    assert record["rewards"] == {"format": 0.5} and record["metrics"] == {"calls": 2.0}
    assert record["failure"] == "deadline: it took too long"
