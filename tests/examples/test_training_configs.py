"""The configs of the examples load, and pass all checks that a run makes before it starts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.demo import make_model as demo
from examples.reasoning_gym import make_model as reasoning_gym
from examples.tools import make_model as tools
from examples.tools.problems import write_files
from fiberpo_megatron.config import load_config
from fiberpo_megatron.trainer.preflight import preflight

ROOT = Path(__file__).parents[2]
MODELS = {"domains": demo, "reasoning_gym": reasoning_gym, "tools": tools}
EXAMPLES = tuple(MODELS)
FIBERPO = ["--algorithm.objective", "fiberpo", "--algorithm.budgets", "{}"]


def check(file: str, command: str, tmp_path: Path, *options: str) -> None:
    MODELS[file.split("/")[0]].write_model(tmp_path / "model")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model/model.safetensors")  # weights are there, and not yet read
    words = ["--model.path", str(tmp_path / "model"), "--run.folder", str(tmp_path / "run"), *options]
    preflight(load_config(ROOT / "examples" / file, words), command, resume=False, world_size=1)


@pytest.mark.parametrize(
    ("file", "command", "options"),
    [
        pytest.param("domains/warmup.toml", "sft", [], marks=pytest.mark.exhaustive),
        ("domains/train.toml", "train", []),
        pytest.param("domains/train.toml", "train", FIBERPO, marks=pytest.mark.exhaustive),
        pytest.param("reasoning_gym/warmup.toml", "sft", [], marks=pytest.mark.exhaustive),
        ("reasoning_gym/train.toml", "train", []),
        pytest.param("tools/warmup.toml", "sft", [], marks=pytest.mark.exhaustive),
    ],
)
def test_they_pass_the_checks_before_a_run(file, command, options, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(file, command, tmp_path, *options)


def test_the_tool_example_passes_them_with_its_own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the config names files in runs/tools
    write_files(tmp_path / "runs/tools")
    check("tools/train.toml", "train", tmp_path)


@pytest.mark.parametrize("example", EXAMPLES)
def test_training_begins_with_the_weights_of_the_warmup(example):
    warmup, train = (load_config(ROOT / "examples" / example / f"{name}.toml", []) for name in ("warmup", "train"))
    assert train.model.path == warmup.run.folder / "hf"


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_results_have_the_runs_and_their_control(example):
    lines = (ROOT / "examples" / example / "results/results.jsonl").read_text().splitlines()
    evaluations = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    names = {record["run"] for record in evaluations}
    assert len(names) >= 2 and any(name.startswith("control") for name in names)
    assert all({0} < {e["step"] for e in evaluations if e["run"] == name} for name in names)
