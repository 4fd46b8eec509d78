"""The command line where no rank is started."""

import shutil
from pathlib import Path

import pytest

from fiberpo_megatron.cli.main import local_world_size, main
from fiberpo_megatron.config import load_config

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "examples/demo/train.toml")
WARMUP = str(ROOT / "examples/demo/warmup.toml")
MODEL = ROOT / "examples/demo/model"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("check-model", "train", "sft", "eval", "report"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.toml"], "nowhere.toml does not exist"),
        (["train", DEMO, "--model.pth", "x"], "model.pth: unknown key; did you mean 'path'"),
        (["train", DEMO, "--model.path", "examples"], "there is no examples/config.json"),
        (["train", DEMO, "--model.path", str(ROOT / "examples/demo/model")], "has no *.safetensors weights"),
        (
            ["train", DEMO, "--model.path", str(ROOT / "examples/demo/model"), "--model.random_init", "true"],
            "warm it up with `fiberpo sft`",
        ),
        (
            ["sft", WARMUP, "--model.path", str(MODEL), "--parallel.expert", "3"],
            "parallel.expert = 3 does not divide the number of experts",
        ),
        (
            ["eval", DEMO, "--model.path", str(ROOT / "examples/demo/model"), "--model.random_init", "true"]
            + ["--model.dtype", "bfloat16", "--model.fp8", "hybrid"],
            'model.fp8 = "hybrid": no NVIDIA GPU is visible here',
        ),
        (["check-model", "nowhere"], "nowhere has no config.json"),
        (["check-model", "examples", "--parallel.contxt", "2"], "parallel.contxt: unknown key"),
        (["report", "nowhere"], "run folder nowhere does not exist"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("fiberpo: ")


def test_damaged_weights_stop_it_before_anything_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    folder = ["--model.path", str(tmp_path / "model"), "--run.folder", str(tmp_path / "run")]
    assert main(["train", DEMO, *folder]) == 2
    error = capsys.readouterr().err
    assert "model/model.safetensors" in error and "a Git LFS pointer: download it again" in error
    assert not (tmp_path / "run").exists()


def test_local_world_of_the_demo_is_two_ranks_and_four_with_two_stages():
    assert local_world_size(load_config(DEMO)) == 2
    assert local_world_size(load_config(DEMO, ["--parallel.tensor", "2"])) == 2
    assert local_world_size(load_config(DEMO, ["--parallel.pipeline", "2"])) == 4


def test_supervised_training_refuses_routing_replay(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["sft", str(ROOT / "examples/demo/warmup.toml"), "--algorithm.routing_replay", "old"]
    assert main([*words, "--model.path", str(ROOT / "examples/demo/model"), "--run.folder", str(tmp_path)]) == 2
    assert "no recorded routing" in capsys.readouterr().err


def test_what_it_prints_does_not_steer_a_terminal(capsys: pytest.CaptureFixture[str]):
    assert main(["report", "gone\x1b[2J\udcff"]) == 2
    assert capsys.readouterr().err == "fiberpo: run folder gone\\x1b[2J\\udcff does not exist\n"


def test_a_report_that_cannot_be_written_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "report.html").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"fiberpo: the report of {tmp_path} cannot be written: ")
