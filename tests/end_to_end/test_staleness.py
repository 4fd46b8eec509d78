"""Sampling ahead of the training: the command line, two Megatron ranks that both lead a replica, a real SGLang."""

from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.telemetry.step_trace import TRACES, read_trace
from tests.end_to_end.test_replay import assert_same_weights, kill_when_saved, metrics
from tests.end_to_end.test_training import command, processes_of, records, run
from tests.traces import read_trace as read_events

AHEAD = ["--rollout.staleness", "1", "--evaluation.prompts", "0", "--rollout.max_response_tokens", "24"]
LONG = ["--rollout.stop", "[]", "--rollout.max_response_tokens", "400", "--rollout.chunk_tokens", "100"]
"""Responses of a random model that a publication finds unfinished."""


def requests_of(folder: Path) -> list[dict[str, Any]]:
    """Return the requests to engines in the traces of a run."""
    events = [event for _, path in TRACES.stored(folder)[0] for event in read_events(path)]
    return [event for event in events if event.get("cat") == "request"]


def assert_traced(folder: Path) -> None:
    """Check the traces of a run whose responses are cut into segments of 5 tokens, and the picture in its report."""
    traces = [read_trace(path) for _, path in TRACES.stored(folder)[0]]
    assert [trace.step for trace in traces] == list(range(5))
    for before, trace in zip([None, *traces], traces):
        assert {one.leader for one in trace.trajectories} == {0, 1} and len(trace.trajectories) == 32
        assert all(one.ended is not None and one.requests == -(-one.tokens // 5) for one in trace.trajectories)
        began = min(one.began for one in trace.trajectories)
        assert before is None or began < before.end, "it was sampled beside the step before"
        parts = trace.parts()
        assert parts["train"] > 0 and parts["publish"] > 0 and min(parts.values()) > -1e-3
        assert sum(parts.values()) == pytest.approx(trace.end - trace.begin)
    lags = [event["args"]["lag"] for event in requests_of(folder)]
    assert {0, 1} == set(lags)
    last = traces[-1].last
    page = (folder / "report.html").read_text()
    assert last is not None and f"All waited for {last.name}, sample {last.sample} (engine 0, " in page


@pytest.mark.sglang
def test_a_run_that_drains_and_is_killed_is_bitwise_the_one_that_was_not(model: Path, engine: Any, tmp_path: Path):
    """Step s is trained on what the weights of step s - 1 sampled; what had ended at the kill is not asked for again.

    The engine's log-probs depend in their last digits on what it computes at the same time, so that the weights must
    not: those of this method are 0 or 1."""
    options = [*AHEAD, "--trainer.steps", "5", "--rollout.engine.urls", f'["{engine.url}"]']
    options += ["--rollout.chunk_tokens", "5", "--algorithm.importance.method", "sequence-mask"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = run(model, straight, *options)
    assert done.returncode == 0, done.stderr
    steps = records(straight, "train")
    assert [record["lag/max"] for record in steps] == [0, 1, 1, 1, 1]
    assert [record["lag/mean"] for record in steps] == [0, 1, 1, 1, 1]
    assert_traced(straight)
    assert steps[0]["drift/mismatch"] < 1e-4 and all(record["importance/masked_share"] == 0 for record in steps)
    kill_when_saved(command(model, killed, *options), killed, step=2)
    done = run(model, killed, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert "Resumed from" in done.stdout and "had been generated before" in done.stdout
    assert_same_weights(straight, killed)
    assert [step for step, _ in TRACES.stored(killed)[0]] == list(range(5)), "those before the kill among them"
    for name in ("gradient_norm", "reward/mean", "lag/mean", "response_length/mean", "ratio/max"):
        assert [record[name] for record in metrics(straight)] == [record[name] for record in metrics(killed)]
    assert not processes_of(killed)


@pytest.mark.sglang
@pytest.mark.parametrize("partial", ["segment", pytest.param("retract", marks=pytest.mark.exhaustive)])
def test_unfinished_responses_go_on_under_new_weights(model: Path, engine: Any, tmp_path: Path, partial: str):
    """Every token has the log-prob of the weights that sampled it, and none is older than allowed."""
    options = [*AHEAD, *LONG, "--trainer.steps", "6", "--rollout.partial", partial, "--rollout.staleness", "2"]
    folder = tmp_path / "run"
    done = run(model, folder, *options, "--rollout.engine.urls", f'["{engine.url}"]', "--batch.prompts", "16")
    assert done.returncode == 0, done.stderr
    steps = records(folder, "train")
    assert len(steps) == 6 and max(record["lag/max"] for record in steps) <= 2
    assert any(0 < value < 1 for record in steps for name, value in record.items() if "lag/token_share" in name)
    if partial == "segment":
        assert "abort" in {request["args"]["finish_reason"] for request in requests_of(folder)}
        assert sum(record.get("requests/continued", 0) for record in steps) > 0
    for record in steps:
        assert sum(value for name, value in record.items() if name.startswith("lag/token_share/")) == pytest.approx(1)
        assert record.get("drift/mismatch", 0.0) < 1e-3  # of tokens of lag 0, where there are any
