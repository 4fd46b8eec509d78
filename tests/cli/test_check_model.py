"""`fiberpo check-model` with real ranks: a model that is computed alike, and one that is not."""

import io
import json
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import load_config
from fiberpo_megatron.trainer import transformers_reference as reference
from fiberpo_megatron.trainer.model_check import compare
from tests.mcore.weights.weights_reference import write_model

TOKENIZER = Path(__file__).parents[2] / "examples/demo/model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deepseek_v3"
    write_model(folder, "deepseek_v3")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_agreement(model: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["check-model", str(model), "--prompt", "12+34=046", "--parallel.tensor", "2"]) == 0
    shown = capfd.readouterr().out
    assert "\n  routed_scaling_factor = 1.7\n" in shown and "computes what transformers computes" in shown
    assert "first to differ" not in shown


def compare_in_rank(config_file: str) -> tuple[str, str]:
    """What a rank prints, and its error."""
    shown, error = io.StringIO(), ""
    with redirect_stdout(shown):
        try:
            compare(load_config(config_file, []))
        except ValueError as caught:
            error = str(caught)
    return shown.getvalue(), error


def test_mismatch(model: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers is given a config that says something else about the second half of the model."""
    load = reference.load_model
    told: list[tuple[str, str]] = []

    def changed(folder: Path) -> object:
        found = load(folder)
        for layer in found.model.layers[2:]:
            layer.mlp.gate.routed_scaling_factor = 1.0
        return found

    def launch(arguments: Sequence[str], ranks: int, *_: object) -> int:
        told.extend(run_ranks(ranks, compare_in_rank, arguments[3]))
        return int(any(error for _, error in told))

    monkeypatch.setattr(reference, "load_model", changed)
    monkeypatch.setattr("fiberpo_megatron.launch.local.launch_ranks", launch)
    assert main(["check-model", str(model), "--prompt", "12+34=046"]) == 1
    [(shown, error)] = told
    assert [line.split()[0] for line in shown.splitlines() if "first to differ" in line] == ["2"]
    assert "log-probs differ from transformers'" in error and "first in layer 2; do not train this model" in error


def test_a_field_that_is_not_known_stops_it(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = tmp_path / "strange"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_gate_noise": 0.5}))
    assert main(["check-model", str(folder), "--prompt", "1+1=2"]) == 2
    assert "the field moe_gate_noise = 0.5 is not known" in capfd.readouterr().err


def test_ranks_that_fail_before_comparing_are_no_disagreement(model: Path, monkeypatch: pytest.MonkeyPatch):
    """As with a tensor that is missing."""
    monkeypatch.setattr("fiberpo_megatron.launch.local.launch_ranks", lambda *_: 1)
    assert main(["check-model", str(model), "--prompt", "1+1=2"]) == 2
