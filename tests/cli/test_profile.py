"""`fiberpo profile`: what it refuses, what it waits for, and what it prints."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fiberpo_megatron.cli import profile
from fiberpo_megatron.cli.main import main
from fiberpo_megatron.run_lock import take
from fiberpo_megatron.telemetry.profile_request import (
    REQUEST_FILE,
    ProfileRequest,
    ProfileStatus,
    read_request,
    write_request,
    write_status,
)

READY = ProfileStatus("ready", ranks=4, engines=1)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "POLL_S", 0.01)


@contextmanager
def a_run(folder: Path, command: str = "train", status: ProfileStatus | None = READY) -> Iterator[None]:
    """A run that holds the folder."""
    with take(folder, command, lambda loss: None):
        if status is not None:
            write_status(folder, status)
        yield


@contextmanager
def answering(folder: Path, answer: Callable[[ProfileRequest], None]) -> Iterator[None]:
    """A run that reads the request when it comes."""

    def work() -> None:
        deadline = time.monotonic() + 20
        while not (folder / REQUEST_FILE).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        answer(read_request(folder))

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["profile", *words]) == 2
    return capsys.readouterr().err


def test_it_asks_waits_and_prints_the_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seen: list[ProfileRequest] = []

    def answer(request: ProfileRequest) -> None:
        seen.append(request)
        running = replace(READY, state="running", id=request.id, step=12)
        write_status(tmp_path, running)
        time.sleep(0.1)
        (tmp_path / REQUEST_FILE).unlink()
        write_status(tmp_path, replace(running, state="done", files=("a.json.gz", "b.json.gz")))

    with a_run(tmp_path), answering(tmp_path, answer):
        assert main(["profile", str(tmp_path), "--steps", "2", "--ranks", "3,0", "--engines"]) == 0
    out = capsys.readouterr()
    assert out.out.split() == [str(tmp_path / "profiles" / name) for name in ("a.json.gz", "b.json.gz")]
    assert "Waiting for the next step to begin (0 s) ..." in out.err and "ui.perfetto.dev" in out.err
    assert [(r.steps, r.ranks, r.engine_passes) for r in seen] == [(2, (0, 3), profile.ENGINE_PASSES)]


def test_a_trace_that_is_missing_is_named_and_gives_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def answer(request: ProfileRequest) -> None:
        write_status(tmp_path, replace(READY, state="done", id=request.id, problems=("rank 0: the disk is full",)))

    with a_run(tmp_path), answering(tmp_path, answer):
        assert main(["profile", str(tmp_path), "--ranks", "all"]) == 1
    assert "fiberpo: rank 0: the disk is full" in capsys.readouterr().err


def test_what_cannot_work_is_refused_with_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "does not exist" in refused(capsys, str(tmp_path / "nowhere"))
    assert "no run writes into" in refused(capsys, str(tmp_path)), "no lock was ever taken"
    with a_run(tmp_path, status=None):
        assert "ask again after its first step" in refused(capsys, str(tmp_path))
    assert "start it, or continue it with --resume" in refused(capsys, str(tmp_path)), "the lock is released"
    with a_run(tmp_path, "sft"):
        assert "only the steps of `fiberpo train`" in refused(capsys, str(tmp_path))
    with a_run(tmp_path):
        assert "rank 4 does not exist, the run has ranks 0 to 3" in refused(capsys, str(tmp_path), "--ranks", "0,4")
        assert "give ranks with commas" in refused(capsys, str(tmp_path), "--ranks", "-1")
        assert "from 1 on" in refused(capsys, str(tmp_path), "--steps", "0")
        assert "from 1 on" in refused(capsys, str(tmp_path), "--engine-passes", "0")
        write_status(tmp_path, replace(READY, engines=0))
        assert "samples from no engine" in refused(capsys, str(tmp_path), "--engines")
        assert not (tmp_path / REQUEST_FILE).exists()
        write_request(tmp_path, ProfileRequest("other", 1, (0,)))
        assert f"delete {tmp_path / REQUEST_FILE}" in refused(capsys, str(tmp_path))
        assert read_request(tmp_path).id == "other"


def test_it_does_not_wait_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with a_run(tmp_path):
        message = refused(capsys, str(tmp_path), "--timeout", "0.05")
    assert "still waits for the next step to begin; the run is `fiberpo train` on host" in message
    assert "The request is withdrawn. Give a larger --timeout" in message and not (tmp_path / REQUEST_FILE).exists(), (
        "it is withdrawn"
    )

    def begin(request: ProfileRequest) -> None:
        write_status(tmp_path, replace(READY, state="running", id=request.id, step=7))

    with a_run(tmp_path), answering(tmp_path, begin):
        message = refused(capsys, str(tmp_path), "--steps", "3", "--timeout", "0.3")
    assert "still waits for the traces of steps 7 to 9" in message and "will still be written" in message
    (tmp_path / REQUEST_FILE).unlink()

    held = take(tmp_path, "train", lambda loss: None)
    with answering(tmp_path, lambda request: held.close()):
        write_status(tmp_path, READY)
        message = refused(capsys, str(tmp_path))
    assert "has ended while this command waited for the next step to begin" in message
