"""What a beginner gets wrong: one clear message, a non-zero exit, nothing left running, no checkpoint lost."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.launch import local
from tests.end_to_end.test_training import ROOT, command, processes_of, run

ONE_RANK = ("--parallel.expert", "1", "--trainer.steps", "1")


def failure(model: Path, folder: Path, *words: str, verb: str = "train") -> str:
    """stderr of a run that has to fail, checked to be short and to leave nothing behind."""
    done = run(model, folder, *words, verb=verb, timeout_s=120)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "fiberpo:" in line]) <= 2, done.stderr
    assert not processes_of(folder)
    return done.stderr


Refusal = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """stderr of a command line that has to be refused before a rank starts, in this process, which has imported
    everything."""

    def started(*_: object) -> int:
        raise AssertionError("ranks were started")

    def refused(model: Path, folder: Path, *words: str) -> str:
        with monkeypatch.context() as place:
            place.chdir(ROOT)
            place.setattr(local, "launch_ranks", started)
            capsys.readouterr()
            assert main(command(model, folder, *words)[3:]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert len([line for line in error.splitlines() if "fiberpo:" in line]) <= 2, error
        assert not (folder / "logs").exists() and not processes_of(folder)
        return error

    return refused


def test_before_any_process_starts(model: Path, tmp_path: Path, refusal: Refusal):
    folder = tmp_path / "run"
    assert "parallel.tensr: unknown key; did you mean 'tensor'" in failure(model, folder, "--parallel.tensr", "2")
    assert "there is no /nowhere/config.json" in refusal(Path("/nowhere"), folder)
    assert "choose one of fiberpo" in refusal(model, folder, "--algorithm.objective", "fibrepo")
    assert "samples_per_prompt = 1" in refusal(model, folder, "--batch.samples_per_prompt", "1")
    assert "C_minus of level 'trajectory' is -0.1" in refusal(
        model, folder, "--algorithm.budgets", "{trajectory = [0.1, -0.1]}"
    )
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("")
    assert "already holds a run" in refusal(model, folder)


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (("--parallel.expert", "3"), "parallel.expert = 3 does not divide", "use one of [1, 2"),
        (("--parallel.tensor", "3"), "parallel.tensor = 3 does not divide", "use one of [1, 2"),
        (("--parallel.pipeline", "3", "--parallel.expert", "1"), "parallel.pipeline", "make the product 2 or less"),
    ],
    ids=["experts", "heads", "layers"],
)
def test_layouts_that_do_not_divide(
    model: Path, tmp_path: Path, refusal: Refusal, words: tuple[str, ...], message: str, fix: str
):
    error = refusal(model, tmp_path / "run", *words)
    assert message in error and fix in error


def jsonl(train: Path) -> tuple[str, str]:
    return "--environments", f'[{{name = "mine", use = "chat", options = {{name = "mine", train = "{train}"}}}}]'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the prompt file"),
        ("", "holds no prompts; write one JSON object a line"),
        ('{"prompt": "1+1=", "answer": "2"}\n{"prompt": }', "mine.jsonl, line 2: not a JSON object"),
    ],
    ids=["missing", "empty", "bad line"],
)
def test_prompt_files(model: Path, tmp_path: Path, refusal: Refusal, content: str | None, message: str):
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_text(content)
    error = refusal(model, tmp_path / "run", *ONE_RANK, *jsonl(path))
    assert message in error and "mine.jsonl" in error and "environment 'mine'" in error


def test_a_package_that_is_not_installed(model: Path, tmp_path: Path, refusal: Refusal):
    words = ("--environments", '[{name = "mine", use = "no_such_package.sums:Sums"}]')
    error = refusal(model, tmp_path / "run", *ONE_RANK, *words)
    assert "there is no module 'no_such_package'" in error


def test_a_prompt_that_is_too_long(model: Path, tmp_path: Path):
    error = failure(model, tmp_path / "run", *ONE_RANK, "--data.max_prompt_tokens", "2")
    assert "the prompt has 6 tokens, allowed are 1 to data.max_prompt_tokens = 2; shorten it or raise" in error
    assert "rank 0" in error and not (tmp_path / "run/engines").exists()  # no engine was started


def test_dead_engine(model: Path, tmp_path: Path):
    error = failure(model, tmp_path / "run", *ONE_RANK, "--rollout.engine.urls", '["http://127.0.0.1:9"]')
    assert "http://127.0.0.1:9" in error


def test_busy_port(model: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = failure(model, tmp_path / "run", *ONE_RANK, "--rollout.engine.port", port)
    assert port in error and "port" in error


def test_non_finite_loss_stops_before_the_weights_move_and_keeps_the_checkpoint(model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    fine = run(model, folder, *ONE_RANK, "--sft.steps", "1", verb="sft")
    assert fine.returncode == 0, fine.stderr
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    saved = sorted((folder / "checkpoints").iterdir())
    (folder / "metrics.jsonl").unlink()
    error = failure(broken, folder, *ONE_RANK, "--sft.steps", "2", verb="sft")
    assert "not finite" in error and "weights unchanged" in error and "rank 0" in error
    assert sorted((folder / "checkpoints").iterdir()) == saved
