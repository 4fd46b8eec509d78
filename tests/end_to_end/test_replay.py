"""Rollouts from disk: `fiberpo dump`, `--storage.replay`, and a resumed run that is bitwise the straight one."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fiberpo_megatron.cli.main import main as fiberpo
from tests.end_to_end.test_training import ROOT, command, processes_of, records, run
from tests.traces import named, read_trace

SIX_STEPS = ["--trainer.steps", "6", "--evaluation.prompts", "0", "--weight_sync.method", "disk"]
FILTER = ["--batch.filter.on", "reward", "--batch.filter.oversample", "1.1", "--batch.filter.max_refills", "16"]
FILTER += ["--batch.samples_per_prompt", "3"]  # with coins for rewards a quarter of the groups do not differ
OF_THE_MACHINE = (
    *("seconds/", "tokens_per_second", "tflops_per_gpu/", "mfu/", "gate/time_share", "gate/reduce_share", "idle_share"),
    *("gpu/", "memory/", "disk/", "energy/", "slowest/", "engines/", "goodput", "restart/", "idle/"),
    *("requests/", "rollout/"),
)
"""Metrics of time and machines, which differ between runs that learn the same."""
COUNTED = ("dropped_groups", "refilled_groups", "aborted_groups")
OF_ENGINES = ("mismatch/",)
"""Metrics of a run's own engines, which a replay does not have."""


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Training records without times."""
    return [
        {k: v for k, v in record.items() if not k.startswith(OF_THE_MACHINE)} for record in records(folder, "train")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def kill_when_saved(words: list[str], folder: Path, step: int) -> None:
    """kill -9 the run once the checkpoint of `step` is complete."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / f"step-{step:08d}").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while processes_of(folder):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.05)


def profile(folder: Path, run: "subprocess.Popen[str]") -> None:
    """Ask the run for traces of both ranks and of the engine, as soon as it takes requests, and wait for them."""
    deadline = time.monotonic() + 120
    while not (folder / "profiles/status.json").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert fiberpo(["profile", str(folder), "--ranks", "all", "--engines", "--engine-passes", "3"]) == 0


def assert_traces(folder: Path) -> None:
    """Check that both ranks' traces name the phases and micro-batches, and that the engine's is a trace as well."""
    paths = sorted(folder.glob("*.json.gz"))
    kinds = [re.sub(r"step-\d{6}-", "", path.name) for path in paths]
    assert kinds == ["engine-000-TP-0.trace.json.gz", "rank-00000.json.gz", "rank-00001.json.gz"]
    assert len({path.name[:11] for path in paths}) == 1, "all begin with the same step"
    for path in paths[1:]:
        events = read_trace(path)
        names = set(named(events))
        assert {"generate", "old_log_probs", "train", "gate", "optimizer", "publish"} <= names
        assert {"forward micro-batch 0", "backward micro-batch 0"} <= names
        backward = [event for event in events if event["name"] == "backward micro-batch 0" and event["ph"] == "X"]
        inside = [e for e in events if e.get("cat") == "cpu_op" and e["name"].startswith("autograd::engine")]
        assert any(b["ts"] <= e["ts"] <= b["ts"] + b["dur"] for b in backward for e in inside)
    assert any("aten::" in event["name"] for event in read_trace(paths[0]))


@pytest.mark.sglang
def test_six_steps_straight_and_three_kill_three_are_bitwise_the_same(model: Path, engine: Any, tmp_path: Path):
    """Two ranks, expert parallelism 2: a run with an engine that is profiled meanwhile, and its replay, which is killed
    after three steps and has no profile. A filter replaces groups all of whose rewards are equal."""
    straight, replayed = tmp_path / "straight", tmp_path / "replayed"
    engines = ["--rollout.engine.urls", f'["{engine.url}"]']
    words = command(model, straight, *SIX_STEPS, *FILTER, *engines, "--storage.dump", "true")
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        profile(straight, process)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert_traces(straight / "profiles")
    assert len(list((straight / "dump").glob("step_*.npz"))) == 6
    for record in records(straight, "train"):
        assert record["groups/zero_variance_share"] == record["filter/missing_share"] == 0
    counts = {name: sum(record[f"filter/{name}"] for record in metrics(straight)) for name in COUNTED}
    assert all(counts.values()), counts

    replay = [*SIX_STEPS, *FILTER, "--storage.replay", str(straight), "--rollout.engine.urls", '["http://127.0.0.1:9"]']
    kill_when_saved(command(model, replayed, *replay), replayed, step=3)
    assert len(records(replayed, "train")) < 6
    done = run(model, replayed, *replay, "--resume")
    assert done.returncode == 0, done.stderr
    assert "Resumed from" in done.stdout and "no engine, no publication" in done.stdout
    assert_same_weights(straight, replayed)
    of_both = [{k: v for k, v in record.items() if not k.startswith(OF_ENGINES)} for record in metrics(straight)]
    assert of_both == metrics(replayed)
    assert not (replayed / "engines").exists() and not (replayed / "published").exists()


@pytest.mark.exhaustive
@pytest.mark.sglang
def test_dump_without_training_and_another_objective_on_it(model: Path, engine: Any, tmp_path: Path):
    options = ["--trainer.steps", "2", "--evaluation.prompts", "0", "--weight_sync.method", "disk"]
    done = run(model, tmp_path / "a", *options, "--rollout.engine.urls", f'["{engine.url}"]', verb="dump")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "a/dump/index.jsonl").read_text().splitlines()]
    assert [(line["step"], line["weights"], line["trajectories"]) for line in lines] == [(0, "0", 32), (1, "0", 32)]
    assert not (tmp_path / "a/checkpoints").exists()

    replay = [*options, "--storage.replay", str(tmp_path / "a"), "--algorithm.objective", "gspo"]
    done = run(model, tmp_path / "b", *replay)
    assert done.returncode == 0, done.stderr
    first, second = records(tmp_path / "b", "train")
    assert first["rollout_diff/max"] < 1e-4  # the first step's weights are those that sampled
    assert [first["reward/mean"], second["reward/mean"]] == [line["reward_mean"] for line in lines]
