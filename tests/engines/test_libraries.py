"""Two versions of NCCL are refused where engines start, also by an engine host, which starts no server then."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.engines import command, libraries
from fiberpo_megatron.engines.command import TorchLibraries, torch_libraries
from fiberpo_megatron.engines.errors import EngineStartError
from fiberpo_megatron.engines.registry import Registry
from fiberpo_megatron.launch import engine_host


def interpreter(path: Path, does: str) -> Path:
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


def config(python: Path | None, method: str = "distributed", **engine: object) -> Config:
    of_engine = engine | ({} if python is None else {"python": str(python)})
    sections = {"model": {"path": "m"}, "weight_sync": {"method": method}, "rollout": {"engine": of_engine}}
    return Config.model_validate(sections)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The engines' interpreter, which has another NCCL than this one."""
    python = interpreter(tmp_path / "python", "exit 3")
    found = {sys.executable: TorchLibraries("2.14.1", "2.30.7"), str(python): TorchLibraries("2.14.1", "2.28.3")}
    monkeypatch.setattr(libraries, "torch_libraries", found.__getitem__)
    return python


def test_two_versions_are_refused_where_they_would_meet(theirs: Path):
    with pytest.raises(ConfigError, match=r"has NCCL 2.30.7 \(torch 2.14.1\).*has NCCL 2.28.3"):
        libraries.check_nccl(config(theirs))
    libraries.check_nccl(config(None))
    libraries.check_nccl(config(theirs, urls=["http://a:1"]))  # somebody else started them
    libraries.check_nccl(config(theirs, method="disk"))


def test_an_interpreter_without_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="rollout.engine.python: .*python cannot import torch: no torch; install"):
        monkeypatch.setattr(sys, "executable", str(interpreter(tmp_path / "ours", "echo 2.14.1 2.30.7")))
        libraries.check_nccl(config(interpreter(tmp_path / "python", "echo no torch >&2; exit 1")))
    monkeypatch.setattr(command, "ASK_TIMEOUT_S", 0.2)
    with pytest.raises(RuntimeError, match="cannot import torch within 0.2 s"):
        torch_libraries(str(interpreter(tmp_path / "slow", "exec sleep 60")))


@pytest.fixture
def signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_an_engine_host_compares_on_its_own_node_says_so_to_the_run_and_starts_nothing(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "slurm/7/engines"
    folder.mkdir(parents=True)
    (folder / "hosts").write_text("n3\n")
    (folder / "api_key").write_text("secret\n")
    (folder / "api_key").chmod(0o600)
    started: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine_host, "make_servers", lambda *arguments, **named: started.append(arguments))
    assert engine_host.serve(config(theirs, count=2), folder, "n3", ["127.0.0.1"], first_gpu=0) == 1
    assert not started
    captured = capsys.readouterr()
    assert "engines of n3" in captured.err and "has NCCL 2.28.3" in captured.err
    with pytest.raises(EngineStartError, match="has NCCL 2.28.3"):  # rank 0, which waits for the engines
        Registry(folder).wait(5.0)
    sizes = [line for line in captured.out.splitlines() if line.startswith("n3: ")]
    assert sizes[0] == "n3: max_running_requests = 128: one engine's share of a step of 256 responses"
    assert "CUDA graphs decode up to 128 responses" in sizes[1]
