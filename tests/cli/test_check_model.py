"""`fiberpo check-model` with real ranks: a model that is computed alike, and one that is not."""

import json
import shutil
from pathlib import Path

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.trainer import transformers_reference as reference
from tests.mcore.weights_reference import write_model

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


def test_mismatch(model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """transformers is given a config that says something else about the second half of the model."""
    load = reference.load_model

    def changed(folder: Path) -> object:
        found = load(folder)
        for layer in found.model.layers[2:]:
            layer.mlp.gate.routed_scaling_factor = 1.0
        return found

    monkeypatch.setattr(reference, "load_model", changed)
    assert main(["check-model", str(model), "--prompt", "12+34=046"]) == 1
    out, err = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines() if "first to differ" in line] == ["2"]
    assert "log-probs differ from transformers'" in err and "first in layer 2; do not train this model" in err


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
