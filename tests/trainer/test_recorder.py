"""The run folder as the trainer writes it: the report after the last step."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fiberpo_megatron.trainer import run as run_module
from fiberpo_megatron.trainer.run import Run
from tests.trainer.toy import SingleLayout, TablePolicy


def finished_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run after its last step, whose weights are a table."""
    monkeypatch.setattr(run_module, "save_hf", lambda *arguments, **options: None)
    run = Run.__new__(Run)
    run.config = SimpleNamespace(run=SimpleNamespace(folder=folder), model=SimpleNamespace(path=folder))
    run.layout, run.policy = SingleLayout(), TablePolicy(1.0)
    return run


def test_a_run_ends_with_its_report(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path, monkeypatch)._finish()
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.html").mkdir()  # a file cannot take its name
    finished_run(tmp_path, monkeypatch)._finish()
    said = capsys.readouterr().out
    assert "WARNING: the report could not be written (IsADirectoryError" in said
    assert f"The run is complete; `fiberpo report {tmp_path}` writes the report" in said


def test_what_the_run_says_does_not_steer_a_terminal(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path, monkeypatch).say("a folder \x1b[2J\ud83d of that name")
    assert capsys.readouterr().out == "a folder \\x1b[2J\\ud83d of that name\n"
