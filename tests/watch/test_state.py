"""What the page says about a run: its state by lock and records, headline figures, phases, alarms, engines."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fiberpo_megatron.process_identity import this_process
from fiberpo_megatron.run_lock import Holder, take
from fiberpo_megatron.telemetry.alarms import ALARMS_FILE, Alarm
from fiberpo_megatron.telemetry.engine_states import EngineState, EngineStates, write_engine_states
from fiberpo_megatron.telemetry.sinks import JsonlSink
from fiberpo_megatron.watch import state as state_module
from fiberpo_megatron.watch.following import FollowedRun
from fiberpo_megatron.watch.phases import phases
from fiberpo_megatron.watch.state import StateWatcher
from fiberpo_megatron.watch.summary import figures
from tests.watch.serving import ask, get_json, served, write_run


def followed(folder: Path) -> FollowedRun:
    run = FollowedRun(folder)
    run.read_all()
    return run


def foreign_lock(folder: Path, beat: str) -> Path:
    """A lock of a process on another machine."""
    process = replace(this_process(), host="node7", boot="another boot")
    holder = Holder(process, "4711", "train", str(folder), "2026-01-01T00:00:00+00:00")
    path = folder / "lock" / "00000001"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(json.dumps(asdict(holder) | {"token": "t"}).encode() + b"\n" + f"{beat:<15}\n".encode())
    return path


def test_states_of_a_run_that_this_process_holds(tmp_path: Path):
    run = followed(write_run(tmp_path, 5))
    watcher = StateWatcher(run)
    assert watcher.state(20).name == "unknown"
    with take(tmp_path, "train", lambda loss: None):
        found = watcher.state(20)
        assert found.name == "running" and "`fiberpo train` on host" in found.detail
        os.utime(tmp_path / "metrics.jsonl", (time.time() - 3600, time.time() - 3600))
        found = watcher.state(20)
        assert found.name == "quiet" and "wrote no record for 60 min; a step takes 2 s" in found.detail
    assert watcher.state(20).name == "stopped"
    assert watcher.state(5).name == "finished"


def test_a_holder_that_was_killed_is_lost(tmp_path: Path):
    run = followed(write_run(tmp_path, 5))
    code = (
        "import sys, time, pathlib; from fiberpo_megatron.run_lock import take\n"
        "take(pathlib.Path(sys.argv[1]), 'train', print); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert StateWatcher(run).state(20).name == "running"
    holder.kill()
    holder.wait()
    assert StateWatcher(run).state(20).name == "lost"
    holder.stdout.close()


def test_a_holder_on_another_machine_is_judged_by_its_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = followed(write_run(tmp_path, 5))
    clock = 1000.0
    monkeypatch.setattr(state_module.time, "monotonic", lambda: clock)
    foreign_lock(tmp_path, "beat 1")
    watcher = StateWatcher(run)
    assert watcher.state(20).name == "running"
    clock += 50
    foreign_lock(tmp_path, "beat 2")
    assert watcher.state(20).name == "running"
    clock += 50
    assert watcher.state(20).name == "running"
    clock += 20
    found = watcher.state(20)
    assert found.name == "lost" and "no sign of life for 70 s" in found.detail and "SLURM job 4711" in found.detail
    foreign_lock(tmp_path, "beat 3")
    assert watcher.state(20).name == "running"


def test_a_lock_that_was_silent_for_long_before_is_lost_at_once(tmp_path: Path):
    path = foreign_lock(tmp_path, "beat 1")
    os.utime(path, (time.time() - 900, time.time() - 900))
    assert StateWatcher(followed(write_run(tmp_path, 5))).state(20).name == "lost"


def test_headline_figures(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(0, "eval", {"accuracy": 0.25})
    for step in range(40):
        sink.write(step, "train", {"reward/mean": step / 40, "seconds/total": 2.0, "tokens_per_second": 100.0 + step})
    sink.write(40, "eval", {"accuracy": 0.75})
    sink.close()
    found = {figure.key: figure for figure in figures(followed(tmp_path), 100, running=True)}
    assert found["accuracy"].text == "25.0 → 75.0 %"
    assert (found["reward/mean"].first, found["reward/mean"].value) == pytest.approx((0.1125, 0.8625))
    assert found["steps"].text == "40 of 100"
    assert found["rest"].value == pytest.approx(120.0) and found["rest"].text == "2 min"
    assert found["spent"].value == pytest.approx(80.0)
    assert found["tokens_per_second"].value == pytest.approx(119.5)
    assert "rest" not in {figure.key for figure in figures(followed(tmp_path), 100, running=False)}


def test_phases_of_a_step_beside_its_plan(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(4):
        times = {"generate": 3.0 + step, "train": 2.0, "gate": 0.5, "pack": 0.25, "total": 6.0 + step}
        if step == 3:
            times["evaluate"] = 0.5
        plan = {"generate": 3.0, "train": 2.0, "host": 0.2, "total": 5.5}
        sink.write(
            step,
            "train",
            {f"seconds/{name}": value for name, value in times.items()}
            | {f"{kind}/seconds/{name}": value for kind in ("expected", "planned") for name, value in plan.items()}
            | {"slowest/train/rank": 3.0, "slowest/train/excess_seconds": 0.125},
        )
    sink.close()
    found = phases(followed(tmp_path), {}, None, 1)
    assert found is not None and (found["from"], found["step"], found["first"], found["last"]) == (4, 4, 1, 4)
    rows = {row["name"]: row for row in found["phases"]}
    assert rows["generate"]["measured"] == 6.0 and rows["generate"]["expected"] == 3.0
    assert rows["train"]["parts"] == {"gate": 0.5, "other than the gate": 1.5}
    assert rows["other"]["measured"] == pytest.approx(9.0 - 6.0 - 2.0 - 0.25 - 0.5)
    assert found["total"] == {"measured": 9.0, "expected": 5.5, "planned": 5.5}
    assert found["slowest"] == {"train": {"rank": 3.0, "excess": 0.125}}
    assert "generate" in " ".join(found["verdict"])
    whole = phases(followed(tmp_path), {}, None, 50)  # without the first step, which has the run's start in it
    assert whole is not None and (whole["from"], whole["step"]) == (2, 4)
    mean = phases(followed(tmp_path), {}, 3, 2)
    assert mean is not None and (mean["from"], mean["step"]) == (2, 3)
    assert {row["name"]: row["measured"] for row in mean["phases"]}["generate"] == 4.5


def test_alarms_and_engines_are_those_of_the_folder(tmp_path: Path):
    write_run(tmp_path, 5)
    with served({"0": tmp_path}, follow=False) as port:
        assert get_json(port, "/api/alarms?run=0") == []
        assert get_json(port, "/api/engines?run=0") is None
        alarm = Alarm(
            *(3, "train", "entropy_collapse", "raised", "entropy", 0.01, 0.1, 2, "The entropy is 0.01."),
            *(("the learning rate is too high",), "optimizer.learning_rate: halve it", "warning"),
        )
        (tmp_path / ALARMS_FILE).write_text(json.dumps(asdict(alarm)) + "\n")
        write_engine_states(tmp_path, EngineStates(4, 1.0, (EngineState("http://a:1", "serving", running=3),)))
        found = get_json(port, "/api/alarms?run=0")
        assert found[0]["rule"] == "entropy_collapse" and found[0]["done"] == 4
        assert get_json(port, "/api/engines?run=0")["engines"][0]["running"] == 3
        assert get_json(port, "/api/runs")[0]["alarms"] == 1
        cleared = asdict(replace(alarm, state="cleared", step=4))
        with (tmp_path / ALARMS_FILE).open("a") as file:
            file.write(json.dumps(cleared) + "\n")
        assert get_json(port, "/api/runs")[0]["alarms"] == 0
        (tmp_path / "engines.json").write_text("[]")
        status, _, body = ask(port, "/api/engines?run=0")
        assert status == 404 and b"engines.json cannot be read" in body


def test_an_answer_that_has_not_changed_is_not_sent_again(tmp_path: Path):
    write_run(tmp_path, 5)
    with served({"0": tmp_path}, follow=False) as port:
        path = "/api/panels?run=0"
        status, headers, body = ask(port, path)
        assert status == 200 and body
        assert ask(port, path, If_None_Match=headers["etag"])[0] == 304
        assert ask(port, path, If_None_Match='"another"')[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "api/curves?run=0&curve=no",
        "api/curves?run=0&curve={}",
        "api/curves?run=0&curve=[" + "[" * 5000,
        "api/curves?run=0&from=x&curve=%7B%22kind%22:%22train%22,%22metric%22:%22entropy%22%7D",
        "api/curves?run=0" + "&curve=%7B%22kind%22:%22train%22,%22metric%22:%22e%22%7D" * 401,
        "api/step?run=0&kind=eval",
        "api/step?run=0&step=nan",
        "api/phases?run=0&over=1e999",
        "api/nothing",
    ],
)
def test_a_bad_question_gets_one_message(tmp_path: Path, path: str):
    write_run(tmp_path, 5)
    with served({"0": tmp_path}, follow=False) as port:
        status, _, body = ask(port, "/" + path)
        assert status in (400, 404) and b"Traceback" not in body


def test_a_step_and_its_neighbours(tmp_path: Path):
    write_run(tmp_path, 5)
    with served({"0": tmp_path}, follow=False) as port:
        found = get_json(port, "/api/step?run=0&step=2")
        assert (found["previous"], found["step"], found["next"], found["last"]) == (1, 2, 3, 5)
        assert found["values"]["reward/mean"] == pytest.approx(0.1)
        assert get_json(port, "/api/step?run=0&step=99")["step"] == 5
        assert get_json(port, "/api/step?run=0")["step"] == 5


def test_it_starts_without_torch(tmp_path: Path):
    code = (
        "import sys\n"
        "import fiberpo_megatron.cli.main, fiberpo_megatron.watch.server\n"
        "print([name for name in ('torch', 'megatron', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
