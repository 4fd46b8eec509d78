import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fiberpo_megatron.telemetry import sinks as sinks_module
from fiberpo_megatron.telemetry.settings import TelemetryConfig
from fiberpo_megatron.telemetry.sinks import (
    JsonlSink,
    Sinks,
    TensorBoardSink,
    WandbSink,
    drop_records,
    open_sinks,
    read_records,
)


def filled(path, steps, kind="train"):
    sink = JsonlSink(path)
    for step in steps:
        sink.write(step, kind, {"reward/mean": step / 10})
    sink.close()
    return path


def test_records_are_json_lines_with_unknown_names_kept(tmp_path):
    sink = JsonlSink(tmp_path / "new" / "metrics.jsonl")
    sink.write(0, "eval", {"accuracy": 0.5, "own": 3, "note": "é", "bad": math.nan, "worse": -math.inf})
    (line,) = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 0,
        "kind": "eval",
        "accuracy": 0.5,
        "own": 3,
        "note": "é",
        "bad": None,
        "worse": None,
    }
    sink.close()


def test_records_survive_a_killed_process(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, signal, pathlib; from fiberpo_megatron.telemetry.sinks import JsonlSink\n"
        f"sink = JsonlSink(pathlib.Path({str(path)!r})); sink.write(1, 'train', {{'a': 1.0}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == -9
    assert read_records(path) == [{"step": 1, "kind": "train", "a": 1.0}]


def test_resuming_drops_the_steps_that_are_repeated(tmp_path):
    path = filled(tmp_path / "m.jsonl", range(7))
    filled(path, [0, 4, 6], kind="eval")
    filled(path, [5], kind="sft")
    with path.open("a") as file:
        file.write('{"step": 7, "ki')
    drop_records(path, 4, ("train", "eval"))
    kept = [(r["kind"], r["step"]) for r in read_records(path)]
    assert kept == [
        *(("train", step) for step in range(4)),
        ("eval", 0),
        ("eval", 4),
        ("sft", 5),
    ]
    assert path.read_text().endswith("\n")
    drop_records(path, 0, ("train", "eval"))
    assert [(r["kind"], r["step"]) for r in read_records(path)] == [("sft", 5)], "from the start: nothing kept"
    drop_records(tmp_path / "none.jsonl", 3, ("train",))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl"]


def test_a_broken_line_inside_is_named(tmp_path):
    path = filled(tmp_path / "m.jsonl", [1])
    with path.open("a") as file:
        file.write("oops\n")
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not a metrics record: 'oops'"):
        read_records(path)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_number_and_hides_repeated_steps(tmp_path):
    first = TensorBoardSink(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, "train", {"own/x": step, "text": "skipped"})
    first.write(0, "eval", {"accuracy": 0.5})
    first.write(3, "eval", {"accuracy": 0.75})
    first.close()
    resumed = TensorBoardSink(tmp_path, 3)
    resumed.write(3, "train", {"own/x": 30})
    resumed.close()
    assert scalars(tmp_path) == {
        "train/own/x": [(2, 1.0), (3, 2.0), (4, 30.0)],
        "eval/accuracy": [(0, 0.5), (3, 0.75)],
    }


class FakeWandb:
    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def init(self, **settings: Any) -> Any:
        self.inits.append(settings)
        return SimpleNamespace(id=settings["id"] or "abc", log=self.logged.append, finish=self.finish)

    def finish(self) -> None:
        self.finished = True


def test_wandb_continues_its_run_on_resume(tmp_path):
    wandb = FakeWandb()
    for _ in range(2):
        sink = WandbSink(wandb, "project", tmp_path, {"seed": 1})
        sink.write(3, "train", {"reward/mean": 0.5})
        sink.close()
    assert [i["id"] for i in wandb.inits] == [None, "abc"] and wandb.inits[0]["config"] == {"seed": 1}
    assert wandb.logged[0] == {"train/step": 4, "train/reward/mean": 0.5} and wandb.finished


def test_wandb_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks_module, "find_spec", lambda name: None)
    settings = TelemetryConfig(wandb_project="p")
    with pytest.raises(ValueError, match="run `pip install wandb`"):
        open_sinks(tmp_path, settings, title="t", first_step=0, total_steps=1)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_all_sinks_of_a_run(tmp_path, capsys):
    for first_step in (0, 1):
        with open_sinks(tmp_path, TelemetryConfig(), title="t", first_step=first_step, total_steps=2) as sinks:
            sinks.write(first_step, "train", {"reward/mean": 0.25, "loss": 1.0})
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [0, 1]
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 1.0), (2, 1.0)]
    assert "step 2/2  reward 0.25" in capsys.readouterr().out
    quiet = TelemetryConfig(tensorboard=False)
    with open_sinks(tmp_path / "quiet", quiet, title="t", first_step=0, total_steps=2):
        pass
    assert not (tmp_path / "quiet" / "tensorboard").exists()


def test_closing_closes_all_and_reports_a_failure(tmp_path):
    class Broken:
        def write(self, step: int, kind: str, metrics: object) -> None: ...

        def close(self) -> None:
            raise OSError("disk full")

    jsonl = JsonlSink(tmp_path / "m.jsonl")
    with pytest.raises(OSError, match="disk full"):
        Sinks([Broken(), jsonl]).close()
    with pytest.raises(ValueError, match="closed file"):
        jsonl.write(1, "train", {})
