import json
import math
import os
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from fiberpo_megatron import durable
from fiberpo_megatron.plugins import PluginError
from fiberpo_megatron.telemetry import sinks as sinks_module
from fiberpo_megatron.telemetry.settings import TelemetryConfig
from fiberpo_megatron.telemetry.sinks import (
    JsonlSink,
    SinkContext,
    Sinks,
    TensorBoardSink,
    WandbSink,
    check_sinks,
    drop_records,
    open_sinks,
    read_records,
)
from tests.distributed.parity import make_config


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


@pytest.mark.parametrize(
    "line",
    [b"oops", b"[1]", b"null", b"\xff", b"\x00" * 50, b"[" * 10**5, b'{"step": 1}', b'{"kind": "train"}', b"1" * 5000,
     b'{"step": true, "kind": "train"}', b'{"step": 1e999, "kind": "train"}', b'{"step": -1, "kind": "train"}',
     b'{"step": 1, "kind": ["train"]}'],
)  # fmt: skip
def test_a_line_that_is_no_record_does_not_stop_a_resume(tmp_path, line, caplog):
    """A machine that was lost may leave such lines in the middle."""
    path = filled(tmp_path / "m.jsonl", [1])
    with path.open("ab") as file:
        file.write(line + b"\n")
    filled(path, [2, 3])
    odd: list[int] = []
    assert [r["step"] for r in read_records(path, odd)] == [1, 2, 3] and odd == [2]
    drop_records(path, 3, ("train",))
    assert [r["step"] for r in read_records(path)] == [1, 2]
    assert f"{path}: 1 lines are no records and were removed, the first was line 2" in caplog.text


def test_names_and_texts_of_any_characters_are_kept(tmp_path):
    path, odd = tmp_path / "m.jsonl", "\x1b[2J\x85\u2028\u202e\ud83d 漢"
    sink = JsonlSink(path)
    sink.write(0, "train", {odd: 1.0, "note": odd})
    sink.close()
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert line.isprintable() and "漢" in line
    assert read_records(path) == [{"step": 0, "kind": "train", odd: 1.0, "note": odd}]
    drop_records(path, 5, ("train",))
    assert path.read_text(encoding="utf-8") == line + "\n"


def test_the_names_of_the_files_last(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(durable, "sync", synced.append)
    path = filled(tmp_path / "m.jsonl", [1])
    assert synced == [tmp_path], "the name of a new file"
    drop_records(path, 1, ("train",))
    assert synced == [tmp_path] * 2 and [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.fixture
def own_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of their names: of the second, the process, and a counter without leading
    zeros, so that a process's files 9 and 10 change places if they are of one second. A resumed run is a later one."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_number_and_hides_repeated_steps(tmp_path, own_counter):
    first = TensorBoardSink(SinkContext(tmp_path, 0, 9), "events")
    for step in (1, 2, 3):
        first.write(step, "train", {"own/x": step, "text": "skipped"})
    first.write(0, "eval", {"accuracy": 0.5})
    first.write(3, "eval", {"accuracy": 0.75})
    first.close()
    resumed = TensorBoardSink(SinkContext(tmp_path, 3, 9), "events")
    resumed.write(3, "train", {"own/x": 30})
    resumed.close()
    assert scalars(tmp_path / "events") == {
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


def test_wandb_continues_its_run_on_resume(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setattr(sinks_module, "import_module", {"wandb": wandb}.get)
    for _ in range(2):
        sink = WandbSink(SinkContext(tmp_path, 0, 9, {"seed": 1}), "project")
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


def test_all_sinks_of_a_run(tmp_path, capsys, own_counter):
    for first_step in (0, 1):
        opened = open_sinks(tmp_path, TelemetryConfig(), title="t", first_step=first_step, total_steps=2)
        with closing(opened) as sinks:
            sinks.write(first_step, "train", {"reward/mean": 0.25, "loss": 1.0})
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [0, 1]
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 1.0), (2, 1.0)]
    assert "step 2/2  reward 0.25" in capsys.readouterr().out
    quiet = TelemetryConfig(tensorboard=False)
    open_sinks(tmp_path / "quiet", quiet, title="t", first_step=0, total_steps=2).close()
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


class Csv:
    """A sink as a user of the package writes one."""

    def __init__(self, context: SinkContext, name: str = "rewards.csv", fails_from: int | None = None) -> None:
        self.fails_from = fails_from
        self.file = (context.run_folder / name).open("a")
        print("begins", context.first_step, context.total_steps, context.config.get("seed"), sep=",", file=self.file)

    def write(self, step: int, kind: str, metrics: Any) -> None:
        if self.fails_from is not None and step >= self.fails_from:
            raise ConnectionError("the service is down")
        print(kind, step, metrics["reward/mean"], sep=",", file=self.file)

    def close(self) -> None:
        self.file.close()
        if self.fails_from is not None:
            raise ConnectionError("still down")


CSV = f"{__name__}:Csv"


def test_a_sink_from_outside_the_package_gets_the_records(tmp_path):
    settings = TelemetryConfig.model_validate({"sinks": [{"use": CSV, "options": {"name": "r.csv"}}]})
    with closing(open_sinks(tmp_path, settings, title="t", first_step=3, total_steps=5, config={"seed": 7})) as sinks:
        sinks.write(3, "train", {"reward/mean": 0.25})
        sinks.write(4, "eval", {"reward/mean": 0.5})
    assert (tmp_path / "r.csv").read_text().splitlines() == ["begins,3,5,7", "train,3,0.25", "eval,4,0.5"]
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2 and (tmp_path / "tensorboard").is_dir()


def test_a_service_that_is_down_is_reported_and_does_not_stop_a_run(tmp_path, capsys):
    sinks = [{"use": CSV, "options": {"fails_from": 1}}]
    settings = TelemetryConfig.model_validate({"sinks": sinks, "tensorboard": False})
    with closing(open_sinks(tmp_path, settings, title="t", first_step=0, total_steps=4)) as opened:
        for step in range(4):
            opened.write(step, "train", {"reward/mean": step})
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all(line.startswith(f"WARNING: the metrics sink {CSV} ") for line in told)
    assert "the record train 1 (ConnectionError: the service is down). Training goes on" in told[0]
    assert "did not take 3 of 4 records" in told[1]
    assert "could not be closed (ConnectionError: still down)" in told[2]


def test_odd_names_reach_every_sink_and_its_errors_do_not_steer_a_terminal(tmp_path, capsys):
    opened = open_sinks(tmp_path, TelemetryConfig(), title="t", first_step=0, total_steps=1)
    with closing(opened) as sinks:
        sinks.write(0, "train", {"\ud83d\x1b": 0.25, "loss": 1.0})
    assert scalars(tmp_path / "tensorboard") == {r"train/\ud83d\x1b": [(1, 0.25)], "train/loss": [(1, 1.0)]}
    sinks_module.OptionalSink("odd", None)._report("said \x1b[2J\ud83d")  # type: ignore[arg-type]
    assert capsys.readouterr().err == "WARNING: the metrics sink odd said \\x1b[2J\\ud83d\n"


def test_metrics_that_cannot_be_kept_stop_a_run(tmp_path):
    opened = open_sinks(tmp_path, TelemetryConfig(tensorboard=False), title="t", first_step=0, total_steps=4)
    opened._sinks[0].close()  # as a full disk or a lost mount: nothing can be written any more
    with pytest.raises(ValueError, match="closed file"):
        opened.write(0, "train", {"loss": 1.0})
    opened.close()


@pytest.mark.parametrize(
    ("sinks", "said"),
    [
        (["tensorbord"], r"telemetry.sinks = \"tensorbord\" is neither .*did you mean 'tensorboard'"),
        ([{"use": CSV, "options": {"nmae": "x"}}], "Csv does not take the option 'nmae'; did you mean 'name'"),
        ([{"use": CSV, "options": {"context": "x"}}], "Csv does not take the option 'context'"),
        (["wandb"], "WandbSink needs the option 'project'"),
        ([f"{__name__}:FakeWandb"], r"FakeWandb lacks the method write\(\)"),
    ],
)
def test_what_is_wrong_is_said_before_a_run_starts(sinks, said):
    with pytest.raises(PluginError, match=said):
        check_sinks(make_config(telemetry={"sinks": sinks}))


def test_settings_of_their_own_stand_for_sinks():
    def names(**settings: Any) -> list[str]:
        return [sink.use for sink in TelemetryConfig.model_validate(settings).all_sinks()]

    assert names() == ["tensorboard"] and names(tensorboard=False) == []
    assert names(sinks=[CSV, "tensorboard"]) == [CSV, "tensorboard"]
    assert names(wandb_project="p", sinks=[CSV]) == ["tensorboard", "wandb", CSV]
    with pytest.raises(ValueError, match='telemetry.wandb_project = "p" and the sink "wandb" .* remove one'):
        names(wandb_project="p", sinks=[{"use": "wandb", "options": {"project": "q"}}])
