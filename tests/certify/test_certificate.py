"""`fiberpo certify`: the command, its two files, its exit code, and the defects that it must find."""

import json
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from fiberpo_megatron.certify import kernels
from fiberpo_megatron.certify.models import MODELS, small_model
from fiberpo_megatron.cli.main import main
from tests.certify.test_peer import tensors
from tests.trainer.test_step_dump import changed, dumped
from tests.variations import varied

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/demo/model"


def config(folder: Path, objective: str = "grpo", model: Path = MODEL) -> str:
    path = folder / "config.toml"
    values = {
        "run": {"folder": str(folder / "run"), "seed": 3},
        "model": {"path": str(model), "random_init": True},
        "algorithm": {"objective": objective, "preset": "paper"},
    }
    path.write_text(tomli_w.dumps(values))
    return str(path)


def found(folder: Path) -> dict:
    return json.loads((folder / "certify.json").read_text())


def test_the_gates_of_a_config_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = config(tmp_path)
    assert main(["certify", path, "--gates-only", "--ranks", "1"]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "run/certify"
    assert said.splitlines()[-1] == f"Passed: {folder / 'certify.md'}"
    page, values = (folder / "certify.md").read_text(), found(folder)
    assert values["passed"] is True
    assert values["command"] == f"fiberpo certify {path} --ranks 1 --gates-only"
    assert f"`{values['command']}`" in page
    assert values["objective"]["use"] == "grpo"
    assert values["machine"]["torch"] == torch.__version__
    assert values["states_not_reached"] == [] and set(values["states_reached"]) == {"token/clipped", "token/free"}
    whats = {check["what"] for check in values["checks"]}
    assert {
        "the same call again",
        "tokens in reverse order",
        "micro-batches of 3 trajectories, without a reduction",
    } < whats
    assert all(check["tolerance"] is None for check in values["checks"] if check["part"].startswith("The gates"))
    for what in whats:
        assert f"| {what} |" in page
    assert "- The whole training step beside one float64 process: --gates-only was given." in page
    assert "float64" in page and "beyond" not in page.split("## Not run")[0].replace("beyond every clamp", "")


DEFECTS = ["OneBit", "MeanPerMicroBatch", "OrderDependent", "Float32Reduction", "RaisesInACut"]


@pytest.mark.parametrize("defect", varied(DEFECTS, ["OneBit", "MeanPerMicroBatch"]))
def test_a_planted_defect_is_exit_code_1(tmp_path: Path, defect: str, monkeypatch: pytest.MonkeyPatch):
    from fiberpo_megatron.certify import certificate
    from fiberpo_megatron.certify.batch import Batch
    from tests.certify.test_gates import tokens

    batch = Batch("one", tokens(groups=4, samples=4, longest=9))
    monkeypatch.setattr(certificate, "made_batches", lambda *_: ([batch], []))
    path = config(tmp_path, f"tests.certify.planted:{defect}")
    assert main(["certify", path, "--gates-only", "--ranks", "1", "--out", str(tmp_path)]) == 1
    values, page = found(tmp_path), (tmp_path / "certify.md").read_text()
    assert values["passed"] is False
    assert "**Not passed**" in page
    if defect == "RaisesInACut":
        assert values["failures"][0]["error"] == "there are no tokens here"
        assert "## Broken off" in page
    elif defect != "Float32Reduction":  # its sums may be refused, which is a failure as well
        assert "## Beyond their bounds" in page
        assert any(not check["passed"] for check in values["checks"])


def test_a_dumped_step_is_replayed_and_cut(tmp_path: Path):
    small = {"prompts": 4, "samples_per_prompt": 3, "mini_batches": 1, "epochs": 2, "micro_batch_tokens": 64}
    file = dumped(tmp_path, "grpo", batch=small)
    path = config(tmp_path, "fiberpo")
    assert main(["certify", path, "--dump", str(file), "--gates-only", "--ranks", "1", "--out", str(tmp_path)]) == 0
    values = found(tmp_path)
    assert values["objective"]["use"] == "grpo"  # the file's, not the config's
    replayed = [check for check in values["checks"] if check["part"] == "The dumped step beside a replay"]
    assert len(replayed) == 8 and all(check["passed"] for check in replayed)
    assert len(values["dump"]["sha256"]) == 64
    wrong = load_file(file)["1/coefficients"].clone()
    wrong.view(torch.int32)[0] ^= 1
    wrong_file = changed(file, tmp_path / "wrong", "1/coefficients", wrong)
    assert (
        main(["certify", path, "--dump", str(wrong_file), "--gates-only", "--ranks", "1", "--out", str(tmp_path)]) == 1
    )
    failed = [check for check in found(tmp_path)["checks"] if not check["passed"]]
    assert [(check["what"], check["subject"][:16]) for check in failed] == [("coefficients", "optimiser step 1")]


def test_a_peers_coefficients_are_reproduced_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file(tensors(), tmp_path / "right")
    save_file(tensors() | {"coefficients": -tensors()["coefficients"]}, tmp_path / "wrong")
    words = ["certify", config(tmp_path, "fiberpo"), "--gates-only", "--ranks", "1", "--out", str(tmp_path), "--dump"]
    assert main([*words, str(tmp_path / "right")]) == 0
    assert main([*words, str(tmp_path / "wrong")]) == 1
    page, values = (tmp_path / "certify.md").read_text(), found(tmp_path)
    assert "they are ours times -1" in values["peer"][0]["hint"]
    assert "## Tokens of optimiser step 0 (9 tokens) that differ most" in page
    assert values["peer"][0]["worst"][0]["where"] in page
    save_file(tensors() | {"advantages": torch.zeros(4)}, tmp_path / "short")
    assert main([*words, str(tmp_path / "short")]) == 2
    assert "tensor 'advantages' [4]: has 4 entries, but coefficients has 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0: at least 1 process is needed"),
        (["--tolerance", "2"], "--tolerance 2.0: use a number from 0"),
        (["--dump", "nothing"], "nothing does not exist"),
        (["--model.path", "nowhere"], "there is no config.json, whose architecture the training step takes"),
        (["--algorithm.objective", "mine"], "unknown objective 'mine'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert main(["certify", config(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_large_model_is_shrunk_in_its_family():
    from fiberpo_megatron.mcore.families import read_architecture

    large = {
        **MODELS["latent"],
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "n_routed_experts": 256,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "vocab_size": 129280,
        "quantization_config": {"quant_method": "fp8"},
    }
    small, shrunk = small_model(large)
    assert shrunk
    assert (small["hidden_size"], small["num_hidden_layers"], small["n_routed_experts"]) == (64, 4, 8)
    assert small["model_type"] == "deepseek_v3" and "quantization_config" not in small
    read_architecture(small)
    same, shrunk = small_model(MODELS["moe"])
    assert not shrunk and same == {**MODELS["moe"], "initializer_range": 0.1}


def test_kernels_that_cannot_run_are_named():
    from fiberpo_megatron.fibration import build_objective
    from tests.certify.planted import OneBit

    assert kernels.why_not(OneBit()) == "objective OneBit has no Triton kernel"
    if not kernels.importlib.util.find_spec("triton"):
        assert kernels.why_not(build_objective("grpo")) == "Triton is not installed for this interpreter"


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_the_whole_certificate(tmp_path: Path):
    """Gates, processes and the training step of the demo's model; the kernels where Triton is installed."""
    path = config(tmp_path, "fiberpo-domain")
    assert main(["certify", path, "--ranks", "4", "--out", str(tmp_path)]) == 0, (tmp_path / "certify.md").read_text()
    values = found(tmp_path)
    assert not values["states_not_reached"]
    steps = {check["what"]: check for check in values["checks"] if check["part"].startswith("The whole training step")}
    assert {name.partition(",")[0] for name in steps} >= {"one process", "DP2", "TP2", "PP2", "CP2", "EP2", "TP2 PP2"}
    assert all(0 < steps[name]["results"]["gradient"]["relative_difference"] < 1e-5 for name in steps)
    assert any("parameters" in check["results"] for check in steps.values())
