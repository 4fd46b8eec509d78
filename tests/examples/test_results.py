"""examples/results.py: tables, plots and files are made of the runs' metrics."""

import json
from pathlib import Path

import pytest

from examples import results


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, best in (("train", 0.5), ("control", 0.25)):
        (tmp_path / name).mkdir()
        records = [{"kind": "eval", "step": 0, "accuracy": 0.25}]
        records += [{"kind": "train", "step": step, "accuracy": 0.2} for step in range(3)]
        records.append({"kind": "eval", "step": 3, "accuracy": best, "truncated_share": 0.1})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def make(runs: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    labels = ["train=right answers rewarded", "control=coin flips rewarded"]
    monkeypatch.setattr("sys.argv", ["results.py", str(runs), *labels, *words])
    results.main()


def test_the_table_is_made_of_the_metrics(runs, monkeypatch, capsys):
    make(runs, monkeypatch)
    table = capsys.readouterr().out.splitlines()[2:]
    assert table[0] == "| steps | 0 | 3 |" and table[2].endswith("| 25.0% | 50.0% |") and table[3].endswith("| 25.0% |")
    assert len((runs / "results.jsonl").read_text().splitlines()) == 10
    assert "coin flips rewarded" in (runs / "curve.svg").read_text()


def test_steps_are_thinned_and_evaluations_are_not(runs, monkeypatch):
    make(runs, monkeypatch, "--every", "2", "--keep", "truncated_share", "--out", str(runs / "out"))
    lines = [json.loads(line) for line in (runs / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train" and line["run"] == "train"] == [0, 2]
    kept = [line.get("truncated_share") for line in lines if line["kind"] == "eval"]
    assert kept == [None, 0.1, None, 0.1]
