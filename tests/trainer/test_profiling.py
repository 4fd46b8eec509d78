"""Profiles on demand, with the toy run: the trace, what a profile changes (nothing), and what goes wrong."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fiberpo_megatron import spans
from fiberpo_megatron.telemetry.profile_request import (
    REQUEST_FILE,
    ProfileRequest,
    read_request,
    read_status,
    write_request,
)
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.profiling import Profiles, _require_whole
from fiberpo_megatron.trainer.stop import Stopped
from tests.traces import named, read_trace
from tests.trainer.test_loop import Memory, training
from tests.trainer.toy import SingleLayout

REQUEST = ProfileRequest("one", steps=2, ranks=(0,))
BATCH = {"prompts": 4, "samples_per_prompt": 2, "mini_batches": 2, "epochs": 2, "micro_batch_tokens": 64}
SMALL: dict[str, Any] = {"trainer": {"steps": 5}, "evaluation": {"prompts": 0}, "batch": BATCH}


@dataclass
class Asking(Memory):
    """A recorder that does something when a step is recorded."""

    then: Callable[[int], None] = lambda step: None

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        super().record(kind, step, metrics)
        if kind == "train":
            self.then(step)


@dataclass
class Engines:
    """Engines that write a trace when they are asked."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    count = 2

    def start(self, folder: Path, step: int, passes: int) -> list[str]:
        self.calls.append(("start", passes))
        return ["an engine could not begin its trace: it is out"]

    def finish(self, folder: Path, step: int) -> tuple[list[str], list[str]]:
        self.calls.append(("finish", step))
        return ["step-000001-engine-000-TP-0.trace.json.gz"], []


def profiled(
    folder: Path, then: Callable[[int], None], said: list[str], engines: Engines | None = None
) -> tuple[Training, Memory]:
    run, memory = training(**SMALL)
    recorder = Asking(then=then)
    profiles = Profiles(folder, SingleLayout(), "cpu", said.append, engines)  # type: ignore[arg-type]
    run = replace(run, recorder=recorder, profiles=profiles)
    run.source.recorder = recorder  # type: ignore[attr-defined]
    return run, recorder


def asked_after(folder: Path, step: int, request: ProfileRequest = REQUEST) -> Callable[[int], None]:
    return lambda done: write_request(folder, request) if done == step else None


def test_a_profile_covers_exactly_the_next_steps_and_changes_nothing(tmp_path: Path):
    """The run is asked during step 1: steps 2 and 3 are in the trace, and the weights have the same bits as without."""
    said: list[str] = []
    run, memory = profiled(tmp_path, asked_after(tmp_path, 1), said)
    assert read_status(tmp_path).state == "ready"  # type: ignore[union-attr]
    train(run)
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.id, status.step) == ("done", "one", 2)
    assert status.files == ("step-000002-rank-00000.json.gz",) and not status.problems
    names = named(read_trace(tmp_path / "profiles" / status.files[0]))
    for phase in ("generate", "pack", "old_log_probs", "train", "publish"):
        assert names.count(phase) == 2, phase
    assert names.count("gate") >= 8, "2 mini-batches and 2 epochs in each of 2 steps, if not one for a micro-batch"
    assert said == [
        "Profiling steps 2 to 3 as `fiberpo profile` asked: ranks 0", f"Profile: 1 trace in {tmp_path / 'profiles'}"
    ]  # fmt: skip
    assert not (tmp_path / REQUEST_FILE).exists() and not spans.marking()

    plain, other = training(**SMALL)
    train(plain)
    assert torch.equal(run.policy.table, plain.policy.table)  # type: ignore[attr-defined]
    assert memory.values("train", "objective/value") == other.values("train", "objective/value")


def test_a_profile_of_engines_alone_and_their_problems(tmp_path: Path):
    engines, said = Engines(), []  # type: ignore[var-annotated]
    request = ProfileRequest("two", steps=1, ranks=(), engine_passes=7)
    run, _ = profiled(tmp_path, asked_after(tmp_path, 0, request), said, engines=engines)
    assert read_status(tmp_path).engines == 2  # type: ignore[union-attr]
    train(run)
    status = read_status(tmp_path)
    assert status is not None and status.files == ("step-000001-engine-000-TP-0.trace.json.gz",)
    assert status.problems == ("an engine could not begin its trace: it is out",)
    assert engines.calls == [("start", 7), ("finish", 1)]
    assert "WARNING: an engine could not begin its trace: it is out. The run goes on" in said


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path):
    (tmp_path / "profiles/step-000001-rank-00000.json.gz").mkdir(parents=True)  # a name that cannot be replaced
    said: list[str] = []
    run, memory = profiled(tmp_path, asked_after(tmp_path, 0), said)
    train(run)
    assert len(memory.values("train", "accuracy")) == 5
    status = read_status(tmp_path)
    assert status is not None and status.state == "done" and not status.files
    assert status.problems[0].startswith("the trace of rank 0 is not written (WriteFailed: ")
    assert any(line.startswith("WARNING: the trace of rank 0 is not written") for line in said)
    assert [path.name for path in (tmp_path / "profiles").iterdir() if path.is_file()] == ["status.json"]


def test_a_run_that_stops_or_fails_ends_its_profile(tmp_path: Path):
    request = replace(REQUEST, steps=100)
    run, _ = profiled(tmp_path, asked_after(tmp_path, 0, request), [])
    asked: list[int] = []
    run.recorder.then = lambda step: [asked_after(tmp_path, 0, request)(step), asked.append(step)]  # type: ignore
    with pytest.raises(Stopped):
        train(replace(run, stop=lambda: len(asked) == 3))
    status = read_status(tmp_path)
    assert status is not None and status.files == ("step-000001-rank-00000.json.gz",), "what it has is written"
    assert named(read_trace(tmp_path / "profiles" / status.files[0])).count("train") == 2

    def fail(step: int) -> None:
        asked_after(tmp_path, 0, replace(request, id="three"))(step)
        if step == 2:
            raise OSError("gone")

    run, _ = profiled(tmp_path, fail, [])
    with pytest.raises(OSError), run.profiles:  # type: ignore[union-attr]
        train(run)
    status = read_status(tmp_path)
    assert status is not None and status.problems == ("the run ended before the profile was complete",)
    assert not (tmp_path / REQUEST_FILE).exists() and not spans.marking()


def test_what_a_killed_run_left_is_cleaned_up_by_the_next(tmp_path: Path):
    write_request(tmp_path, REQUEST)
    run, _ = profiled(tmp_path, lambda step: None, [])
    assert not (tmp_path / REQUEST_FILE).exists()
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.ranks, status.engines) == ("ready", 1, 0)
    run.profiles.boundary(0)
    assert not spans.marking()


@pytest.mark.parametrize("content", ['{"id": "x", "steps": 0}', "oops", '{"id": 3, "steps": 1, "ranks": [], "x": 1}'])
def test_a_request_that_is_none_is_a_warning(tmp_path: Path, content: str):
    said: list[str] = []
    run, _ = profiled(tmp_path, lambda step: None, said)
    (tmp_path / REQUEST_FILE).write_text(content)
    run.profiles.boundary(0)
    assert not (tmp_path / REQUEST_FILE).exists() and not spans.marking()
    assert len(said) == 1 and "WARNING: the request of a profile cannot be read: " in said[0]
    (tmp_path / REQUEST_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"profile_request\.json"):
        read_request(tmp_path)


def test_a_trace_that_torch_left_unfinished_is_refused(tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text(json.dumps({"traceEvents": []}) + "\n")
    _require_whole(path)
    path.write_text('{"traceEvents": [{"ph": "X",')
    with pytest.raises(OSError, match="is the disk full"):
        _require_whole(path)


def test_spans_nest_and_do_nothing_without_a_profile():
    begun: list[str] = []

    class Mark:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            begun.append(self.name)

        def __exit__(self, *error: object) -> None:
            begun.append(f"/{self.name}")

    spans.mark_with(Mark)  # type: ignore[arg-type]
    with spans.span("outer"), spans.span("inner"):
        spans.mark_with(None)
        with spans.span("unseen"):
            pass
    assert begun == ["outer", "inner", "/inner", "/outer"] and not spans.marking()
