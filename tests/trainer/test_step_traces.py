"""Traces of the steps of a whole toy run, those of several leaders, and what happens when one cannot be written."""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.rollout.generator import Generator
from fiberpo_megatron.simulation.clock import VirtualLoop
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.sources.step_traces import StepTraces, tail_metrics
from fiberpo_megatron.telemetry.settings import TelemetryConfig
from fiberpo_megatron.telemetry.step_trace import TRACES, StepTrace, read_trace
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.tracks import Timeline, Track
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.types import Completion
from tests.trainer.test_loop import Memory
from tests.trainer.test_supply import PROMPTS, SAMPLES, STEPS, Timed, ahead
from tests.trainer.toy import SingleLayout

STEP_S, PUBLISH_S = 0.03, 0.01


class Noted(Timed):
    """It notes its requests as a sampler does."""

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: Any) -> list[Completion]:
        track: Track = limits["track"]
        with track.request(self.sampled % 2) as answer:
            found = await super().sample(prompt, seeds, **limits)
            answer.tokens, answer.versions = len(found[0].token_ids), (self.version,)
            answer.finish = found[0].finish_reason
        return found


def traced(folder: Path, staleness: int, keep: int = 50) -> tuple[Training, Memory]:
    """Return a run on a virtual clock, on which sampling, passes over mini-batches and publications take time alone."""
    run, memory, _ = ahead(staleness, Noted(timing=1, seconds=0.02), drain=False)
    loop, source, policy = VirtualLoop(1000.0, lambda: None), run.source, run.policy
    assert isinstance(source, EngineSource) and source.generator is not None
    timers = source.timers = PhaseTimers(clock=loop.time)
    source.generator = replace(source.generator, loop=loop, timeline=Timeline(clock=loop.time))
    source.traces = StepTraces(folder, SingleLayout(), timers, keep, clock=loop.time).write
    step, publish = policy.step, source.publisher.publish

    def slow_step(*arguments: Any, **named: Any) -> Any:
        loop.sleep(STEP_S)
        return step(*arguments, **named)

    def slow_publish(*arguments: Any) -> None:
        loop.sleep(PUBLISH_S)
        publish(*arguments)

    policy.step, source.publisher.publish = slow_step, slow_publish  # type: ignore[method-assign]
    return replace(run, timers=timers), memory


def traces(folder: Path) -> list[StepTrace]:
    return [read_trace(path) for _, path in TRACES.stored(folder)[0]]


@pytest.mark.parametrize("staleness", [0, 1])
def test_every_step_has_the_trace_of_its_trajectories(tmp_path: Path, staleness: int):
    run, memory = traced(tmp_path, staleness)
    train(run)
    generator: Generator = run.source.generator  # type: ignore[attr-defined]
    assert not generator.timeline._steps, "a long run keeps no track of what it has trained on"
    found = traces(tmp_path)
    assert [trace.step for trace in found] == list(range(STEPS))
    tails = memory.values("train", "rollout/tail_seconds")
    for trace, tail, record in zip(found, tails, memory.values("train", "seconds/total"), strict=True):
        assert len(trace.trajectories) == PROMPTS * SAMPLES
        assert all(one.ended is not None and one.requests == 1 and one.tokens for one in trace.trajectories)
        assert trace.tail_s == pytest.approx(tail, abs=1e-5), "the metric is that of the trace"
        assert trace.end - trace.begin == pytest.approx(record, abs=1e-5)
        parts = trace.parts()
        assert sum(parts.values()) == pytest.approx(trace.end - trace.begin)
        published = PUBLISH_S * (1 if trace.step else 2)  # the first step publishes the weights that sample it, too
        assert (parts["train"], parts["publish"]) == pytest.approx((2 * STEP_S, published), abs=1e-5)
        assert staleness or min(parts["waiting"], parts["sampling"]) > 0, "ahead: all may have ended before their turn"
        assert min(parts.values()) > -1e-5, "no part counts twice"
    for before, trace in zip(found, found[1:]):
        assert trace.begin == pytest.approx(before.end, abs=1e-5)
        first = min(one.began for one in trace.trajectories)
        assert (first < before.end - 1e-5) == (staleness > 0), "ahead: sampled beside the step before"


def test_traces_change_nothing_that_is_learned_and_none_are_kept_where_none_are_wanted(tmp_path: Path):
    run, memory = traced(tmp_path, 0)
    train(run)
    other, without = traced(tmp_path / "other", 0, keep=0)
    train(other)
    assert memory.values("train", "gradient_norm") == without.values("train", "gradient_norm")
    assert (tmp_path / "traces").exists() and not (tmp_path / "other").exists()


def test_a_trace_that_cannot_be_written_is_a_warning_and_the_run_goes_on(tmp_path: Path, caplog: Any):
    (tmp_path / "traces").write_text("in the way")
    run, memory = traced(tmp_path, 0)
    with caplog.at_level(logging.WARNING):
        train(run)
    assert len(memory.values("train", "reward/mean")) == STEPS
    warnings = [record.message for record in caplog.records if "is not written" in record.message]
    assert len(warnings) == STEPS and warnings[2].startswith("the trace of step 2 is not written: ")


class Leader(SingleLayout):
    """The first of two leaders; the other one has noted `other`."""

    data_size = 2

    def __init__(self, other: list[dict[str, Any]]) -> None:
        self.other = other
        self.sent: list[Any] = []

    def gather_json(self, value: Any, root_only: bool = False) -> list[Any]:
        assert root_only, "nobody but rank 0 needs them"
        self.sent.append(value)
        return [value, self.other]


def test_rank_0_joins_the_tracks_of_all_leaders(tmp_path: Path):
    async def life(track: Track) -> None:
        with track.request(0):
            await asyncio.sleep(0.01 * random.random())
        track.end()

    timeline = Timeline()
    tracks = [timeline.begin(3, f"sums/{i}", 0) for i in range(4)]
    for track in tracks:
        asyncio.run(life(track))
    other = [{"leader": 1, **track.facts()} for track in tracks[2:]]
    StepTraces(tmp_path, Leader(other), PhaseTimers(), 2).write(3, tracks[:2])
    (trace,) = traces(tmp_path)
    assert sorted((one.name, one.leader) for one in trace.trajectories) == [
        ("sums/0", 0), ("sums/1", 0), ("sums/2", 1), ("sums/3", 1)
    ]  # fmt: skip


def test_of_very_many_trajectories_each_has_fewer_stretches(tmp_path: Path, monkeypatch: Any):
    now = [0.0]
    tracks = [Track(f"a/{i}", clock=lambda: now[0]) for i in range(10)]
    for track in tracks:
        for _ in range(30):
            with track.request(0):
                now[0] += 1
            with track.phase("environment"):
                now[0] += 1
        track.end()
    monkeypatch.setattr("fiberpo_megatron.sources.step_traces.MOST_OF_A_STEP", 100)
    layout = Leader([])
    StepTraces(tmp_path, layout, PhaseTimers(), 2).write(3, tracks)
    ((first, *_),) = layout.sent
    assert len(first["stretches"]) == len(first["segments"]) == 5 and first["requests"] == 30
    assert first["seconds"]["sampling"] == first["seconds"]["environment"] == 30


def test_the_tail_is_that_of_all_leaders():
    assert tail_metrics([[5.0, 1.0], [], [3.0]]) == {"rollout/tail_seconds": 2.0}
    assert tail_metrics([[], []]) == {}


def test_a_selection_of_one_step_is_refused():
    with pytest.raises(ValueError, match=r"trace_steps_kept\n.* it is 1, .*; use 2 or more, or 0 for none"):
        TelemetryConfig(trace_steps_kept=1)
