"""A run has its folder for itself: every way of starting goes through Run, which takes the lock."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.mcore.checkpoint.folders import partial_folder
from fiberpo_megatron.run_lock import RunLocked, RunLockLost, take
from fiberpo_megatron.trainer import run as run_module
from fiberpo_megatron.trainer.recorder import RunCheckpoints
from fiberpo_megatron.trainer.run import Run
from fiberpo_megatron.trainer.settings import CheckpointConfig
from tests.trainer.test_checkpoints import FilePolicy
from tests.trainer.toy import SingleLayout

DEMO = Path(__file__).parents[2] / "examples/demo/train.toml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config whose run has neither a model nor tasks."""

    @contextmanager
    def tasks(*_):
        yield SimpleNamespace(facts=[], prompts=None, sets={}, encoder=None, environments=None)

    layout = SingleLayout()
    layout.world_size = 1
    for name, part in {
        "read_hf_config": lambda *_: {},
        "start_layout": lambda *_: layout,
        "stop_layout": lambda: None,
        "preflight": lambda *_: None,
        "start_tasks": tasks,
        "recorded": lambda config, _: config,
        "build_policy": lambda *_: None,
    }.items():
        monkeypatch.setattr(run_module, name, part)
    return load_config(DEMO, ["--run.folder", str(tmp_path / "run")])


@pytest.mark.parametrize("command", ["train", "sft", "dump", "eval"])
def test_a_second_run_is_refused_while_the_first_is_open(config: Config, command: str):
    with Run.from_config(config, command="train"):
        (config.run.folder / "config.toml").write_text("# of the first")
        with pytest.raises(RunLocked, match="is in use by `fiberpo train` on host"):
            Run.from_config(config, command=command)
        assert (config.run.folder / "config.toml").read_text() == "# of the first"
    Run.from_config(config, command=command).close()


def test_what_the_run_before_left_is_found_although_it_ended_after_the_checks(config: Config):
    """The launcher's checks saw an empty folder, and the run then waited for the lock."""
    config.run.folder.mkdir()
    (config.run.folder / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        Run.from_config(config, checked=True)
    Run.from_config(config, checked=True, resume=True).close()


def test_a_start_that_fails_gives_the_folder_back(config: Config, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as broken:
        broken.setattr(run_module, "build_policy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Run.from_config(config)
    Run.from_config(config).close()


def test_the_command_line_refuses_before_it_starts_ranks(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("fiberpo_megatron.trainer.preflight.preflight", lambda *_: None)
    monkeypatch.setattr("fiberpo_megatron.cli.doctor.warn", lambda *_: None)
    monkeypatch.setattr("fiberpo_megatron.launch.local.launch_ranks", lambda *_: 77)
    words = ["train", str(DEMO), "--run.folder", str(config.run.folder)]
    with take(config.run.folder, "sft", lambda loss: None):
        assert main(words) == 2
    assert "is in use by `fiberpo sft` on host" in capsys.readouterr().err
    assert main(words) == 77


def test_a_run_that_lost_its_folder_neither_saves_nor_prunes(tmp_path: Path):
    """The partial checkpoint is that of the run that took over."""
    lost = False

    def held() -> None:
        if lost:
            raise RunLockLost("this run no longer has its folder")

    for asynchronous in (False, True):
        lost = False
        root = tmp_path / str(asynchronous)
        checkpoints = RunCheckpoints(
            root, CheckpointConfig(keep=1, asynchronous=asynchronous), SimpleNamespace(check=held)
        )
        policy = FilePolicy()
        checkpoints.save(policy, 1, prompts={}, measured={})
        theirs = partial_folder(root / "step-00000002")
        theirs.mkdir(parents=True)
        lost = True
        with pytest.raises(RunLockLost):
            checkpoints.complete(wait=True)
            checkpoints.save(policy, 2, prompts={}, measured={})
        assert theirs.is_dir() and len(policy.begun) == 1
        assert (root / "step-00000001").exists() != asynchronous
