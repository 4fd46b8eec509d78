"""The real thing: the command line, two Megatron ranks, a real SGLang."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.variations import varied

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "examples/demo/train.toml")
SMALL = [
    "--batch.prompts", "8", "--batch.samples_per_prompt", "4", "--batch.mini_batches", "2", "--batch.epochs", "1",
    "--evaluation.prompts", "8", "--rollout.engine.max_total_tokens", "2048",
    "--weight_sync.verify_tolerance", "1e-4", "--optimizer.learning_rate", "1e-3",
    "--data.random_reward", "true",  # a random model is never right, and equal rewards move nothing
]  # fmt: skip


def command(model: Path, folder: Path, *more: str, verb: str = "train") -> list[str]:
    words = [sys.executable, "-m", "fiberpo_megatron.cli.main", verb, CONFIG]
    return [*words, "--model.path", str(model), "--run.folder", str(folder), *SMALL, *more]


def run(
    model: Path, folder: Path, *more: str, verb: str = "train", timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, folder, *more, verb=verb), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Whatever still runs for this run folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and str(folder) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.sglang
def test_three_steps_with_an_engine_of_its_own(model: Path, tmp_path: Path):
    """Every published version arrives: the run itself compares the engine with the trainer to 1e-4 after each."""
    done = run(model, tmp_path / "run", "--trainer.steps", "3")
    assert done.returncode == 0, done.stderr
    steps = records(tmp_path / "run", "train")
    assert [record["step"] for record in steps] == [0, 1, 2]
    assert all(record["rollout_diff/max"] < 1e-4 for record in steps)  # float32 on both sides
    assert all(record["seconds/verify"] > 0 for record in steps)
    assert all(0 < record["seconds/gate"] < record["seconds/train"] for record in steps)
    assert len(records(tmp_path / "run", "eval")) == 2
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "run/hf"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("experts" in name for name in moved) and any("q_proj" in name for name in moved)
    assert not any(name.endswith("mlp.gate.weight") for name in moved)  # the routers are frozen
    versions = [
        {span[0] for line in path.read_text().splitlines() for span in json.loads(line)["weight_versions"]}
        for path in sorted((tmp_path / "run/rollouts").glob("step_*"))
    ]
    assert versions == [{"0"}, {"1"}, {"2"}]
    assert "<svg" in (tmp_path / "run/report.html").read_text()
    assert str(tmp_path / "run/report.html") in done.stdout
    assert not processes_of(tmp_path / "run")


@pytest.mark.exhaustive
@pytest.mark.sglang
@pytest.mark.parametrize("layout", [["tensor", "2"], ["context", "2"], ["pipeline", "2"]], ids=lambda words: words[0])
def test_other_layouts_run(model: Path, engine: Any, tmp_path: Path, layout: list[str]):
    """The demo's other layouts (pipeline with 4 ranks), published by disk."""
    key, size = layout
    urls = f'["{engine.url}"]'
    options = ["--rollout.engine.urls", urls, "--trainer.steps", "1", "--weight_sync.method", "disk"]
    done = run(model, tmp_path / "run", f"--parallel.{key}", size, *options)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "run", "train")
    assert record["rollout_diff/max"] < 1e-4
    assert not processes_of(tmp_path / "run")


@pytest.mark.sglang
def test_expert_objective_on_the_engines_own_routing(model: Path, engine: Any, tmp_path: Path):
    """Trainer and engine choose the same experts for the same tokens, so both sources give the same shares."""
    urls = ["--rollout.engine.urls", f'["{engine.url}"]', "--evaluation.prompts", "0", "--trainer.steps", "2"]
    objective = ["--algorithm.objective", "fiberpo-expert", "--rollout.return_routing", "true"]
    found = {}
    for source in ("old", "rollout"):
        folder = tmp_path / source
        done = run(model, folder, *urls, *objective, "--algorithm.expert_routing", source)
        assert done.returncode == 0, done.stderr
        found[source] = records(folder, "train")
    for record in found["old"]:
        assert record["routing_agreement/mean"] > 0.99  # an exact tie of two router scores may fall either way
        assert record["routing_agreement/layer_1"] > 0.99
        assert record["extra_forwards"] == 1  # 2 optimiser steps; the first has x = 0 by definition
        assert 0 < record["kept_forward_share"] <= 1
        assert record["expert/mass/p0"] + record["expert/mass/p1"] == pytest.approx(1)
    assert found["old"][0]["expert/mass/p0"] == pytest.approx(found["rollout"][0]["expert/mass/p0"], abs=1e-2)


@pytest.mark.sglang
@pytest.mark.parametrize("replay", varied(["old", "rollout"], ["rollout"]))
def test_routing_replay_runs_with_routers_that_learn(model: Path, engine: Any, tmp_path: Path, replay: str):
    urls = ["--rollout.engine.urls", f'["{engine.url}"]', "--evaluation.prompts", "0", "--trainer.steps", "2"]
    options = ["--algorithm.routing_replay", replay, "--model.train_router", "true", "--model.recompute", "full"]
    options += ["--rollout.engine.colocated", "true"]  # memory changes hands between generating and learning
    done = run(model, tmp_path / "run", *urls, *options)
    assert done.returncode == 0, done.stderr
    assert all(record["rollout_diff/max"] < 1e-4 for record in records(tmp_path / "run", "train"))
