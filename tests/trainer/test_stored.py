"""The loop on stored rollouts: replay without an engine, and steps that an interrupted run had generated."""

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fiberpo_megatron.interfaces import SamplingChange, WeightSource
from fiberpo_megatron.rollout.dump import DumpError
from fiberpo_megatron.sources.replay import ReplaySource
from fiberpo_megatron.sources.stored import StoredRollouts, dump_of
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.stop import Stopped
from fiberpo_megatron.types import Completion
from tests.rollout.finished_indices import finished_indices
from tests.trainer.test_loop import Memory, toy_config, training
from tests.trainer.toy import VOCABULARY, CountingPrompts, FakeEngine, SingleLayout, TablePolicy, read

EARLIER_ARRAYS = (
    "tokens", "response_mask", "rollout_log_probs", "lengths", "rewards", "correct", "groups", "domains", "truncated",
    "routed_experts",
)  # fmt: skip


def run_in(
    folder: Path,
    *,
    resume: bool = False,
    start: int = 0,
    engine: FakeEngine | None = None,
    layout: SingleLayout | None = None,
    **sections: object,
) -> tuple[Training, Memory]:
    """A run whose rollouts are stored in `folder`; without an engine where it replays."""
    small = {"prompts": 4, "samples_per_prompt": 4, "mini_batches": 2}
    merged = {"run": {"folder": folder}, "evaluation": {"prompts": 0}, "batch": small, **sections}
    config = toy_config(**merged)
    run, memory = training(engine=engine, **merged)
    store = StoredRollouts(config, VOCABULARY, layout or SingleLayout(), start, resume)
    if config.storage.replay is not None:
        source = ReplaySource(
            SingleLayout(), CountingPrompts(), read, store, PhaseTimers(), config.run.seed, config.batch.prompts
        )
        return replace(run, source=source), memory
    return replace(run, source=replace(run.source, store=store)), memory


def test_a_replayed_run_is_the_run_that_was_dumped(tmp_path: Path) -> None:
    first, recorded = run_in(tmp_path / "a", storage={"dump": True})
    train(first)
    again, replayed = run_in(tmp_path / "b", storage={"replay": tmp_path / "a"})
    train(again)
    assert torch.equal(first.policy.table, again.policy.table)
    for name in ("reward/mean", "gradient_norm", "rollout_diff/max", "ratio/max"):
        assert recorded.values("train", name) == replayed.values("train", name)
    assert not (tmp_path / "b").exists()  # nothing is generated, so nothing is stored


def test_another_objective_on_the_same_data(tmp_path: Path) -> None:
    first, recorded = run_in(tmp_path / "a", storage={"dump": True})
    train(first)
    other, replayed = run_in(
        tmp_path / "b", storage={"replay": tmp_path / "a" / "dump"}, algorithm={"advantage": "none"}
    )
    train(other)
    assert recorded.values("train", "reward/mean") == replayed.values("train", "reward/mean")
    assert not torch.equal(first.policy.table, other.policy.table)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainer": {"steps": 4}}, r"no rollouts of step 3; it has 3 steps from 0 to 2; lower trainer\.steps"),
        ({"rollout": {"temperature": 0.5}}, r"made with rollout\.temperature = 1\.0 \(this run: 0\.5\)"),
        (
            {"environments": [{"name": "sort", "use": "unused:Unused"}]},
            r"environments = \['addition'\] \(this run: \['sort'\]\)",
        ),
        ({"algorithm": {"routing_replay": "rollout"}}, "has no expert routing"),
    ],
    ids=["steps", "temperature", "environments", "routing"],
)
def test_rollouts_of_another_setting_are_refused(tmp_path: Path, sections: dict[str, object], message: str) -> None:
    first, _ = run_in(tmp_path / "a", storage={"dump": True})
    train(first)
    with pytest.raises(DumpError, match=message):
        train(run_in(tmp_path / "b", **{"storage": {"replay": tmp_path / "a"}, **sections})[0])


def test_rollouts_of_other_prompts_are_refused(tmp_path: Path) -> None:
    first, _ = run_in(tmp_path / "a", storage={"dump": True})
    train(first)
    again, memory = run_in(tmp_path / "b", storage={"replay": tmp_path / "a"})
    prompts_at = again.source.prompts.prompts_at
    again.source.prompts.prompts_at = lambda seed, step, count: prompts_at(seed, step + (step == 1), count)
    with pytest.raises(DumpError, match=r"step_000001\.npz holds rollouts of other prompts than this run's step 1"):
        train(again)
    assert memory.saved == [1]


class Killed(Exception):
    """Stands for a kill: nothing after it happens."""


SAMPLES = 4
"""Answers to each prompt."""


class CountingEngine(FakeEngine):
    """Counts answers; its randomness is not that of an earlier engine."""

    answers = 0

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: object) -> list[Completion]:
        self.answers += len(seeds)
        return await super().sample(prompt, seeds)


class SeededEngine(FakeEngine):
    """What it samples depends on the weights and the prompt's seed alone; the last prompt ends first. After `survives`
    answers, once they are scored, it dies; with `hangs` it falls silent instead, and asks for a stop."""

    survives = 10**6
    hangs = False
    asks_to_stop = False

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._asked: list[int] = []
        self._waiting: list[object] = []

    @property
    def asked(self) -> list[float]:
        """Prompts, all of their answers, that were asked for between two publications, where there were any."""
        return [count / SAMPLES for count in self._asked if count]

    def publish(self, source: WeightSource, version: str) -> None:
        super().publish(source, version)
        self._asked.append(0)

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: object) -> list[Completion]:
        self._asked[-1] += len(seeds)
        me = object()
        self._waiting.append(me)
        try:
            await asyncio.sleep(0)  # all requests of the step come before the first is answered
            while self._waiting[-1] is not me:
                await asyncio.sleep(0)
            if self.survives == 0:
                await self._fail()
            self.survives -= 1
            self.random.manual_seed(seeds[0])
            return [self._one(prompt[-1], SamplingChange()) for _ in seeds]
        finally:
            self._waiting.remove(me)

    async def _fail(self) -> None:
        for _ in range(100):  # rounds of the event loop, in which earlier answers are scored
            await asyncio.sleep(0)
        if not self.hangs:
            raise Killed
        self.asks_to_stop = True
        await asyncio.Event().wait()


def cut_while_generating(folder: Path) -> TablePolicy:
    """Of step 1's four prompts three are generated; the policy that would have sampled the fourth."""
    engine = SeededEngine(seed=0)
    engine.survives = (4 + 3) * SAMPLES
    run, _ = run_in(folder, engine=engine)
    with pytest.raises(Killed):
        train(run)
    assert dump_of(folder).steps() == [] and finished_indices(dump_of(folder).unfinished(1)) == {1, 2, 3}
    return run.policy


def interrupted(folder: Path) -> None:
    """Step 1's rollouts are generated; its training does not end."""
    run, _ = run_in(folder)
    step, calls = run.policy.step, []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) > 2:  # optimiser steps of step 0
            raise Killed
        return step(*args, **kwargs)

    run.policy.step = failing
    with pytest.raises(Killed):
        train(run)
    assert dump_of(folder).steps() == [1]


def test_an_interrupted_step_is_not_generated_again(tmp_path: Path) -> None:
    interrupted(tmp_path)
    kept = dump_of(tmp_path).read(1)
    engine = CountingEngine(seed=5)
    run, memory = run_in(tmp_path, resume=True, start=1, engine=engine)
    train(run, start=1)
    assert engine.answers == 4 * SAMPLES  # step 2 only
    assert memory.values("train", "reward/mean")[0] == float(kept.rewards.mean())
    assert dump_of(tmp_path).steps() == []


def test_loaded_weights_are_the_same_whatever_happens_to_them_now(tmp_path: Path) -> None:
    interrupted(tmp_path)
    engine, layout = CountingEngine(seed=5), SingleLayout()
    layout.world_size = 2
    change = {"optimizer": {"learning_rate": 1.0}, "parallel": {"data": 2}}
    train(run_in(tmp_path, resume=True, start=1, engine=engine, layout=layout, **change)[0], start=1)
    assert engine.answers == 4 * SAMPLES


@pytest.mark.parametrize("change", [{"rollout": {"top_p": 0.9}}, {"storage": {"unfinished": False}}], ids=str)
def test_an_interrupted_step_of_other_sampling_is_generated_again(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path)
    engine = CountingEngine(seed=5)
    with caplog.at_level(logging.WARNING):
        train(run_in(tmp_path, resume=True, start=1, engine=engine, **change)[0], start=1)
    assert engine.answers == 8 * SAMPLES
    if "rollout" in change:
        assert "step 1 is generated again" in caplog.text and "by another configuration" in caplog.text


@pytest.mark.parametrize("change", [{"learning_rate": 1.0}, {}], ids=["other", "same"])
def test_weights_that_are_trained_again_are_the_same_with_the_same_configuration(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint of step 1 is lost: what was sampled with the weights that it held is used by a run that trains
    them again in the same way, and is gone before another one has weights of that version."""
    cut_while_generating(tmp_path)
    engine = SeededEngine(seed=0)
    with caplog.at_level(logging.WARNING):
        run, _ = run_in(tmp_path, resume=True, start=0, engine=engine, optimizer=change)
    assert ("rollouts of step 1 are of another configuration: deleted" in caplog.text) == bool(change)
    train(run, start=0)
    assert engine.asked == [4, 4 if change else 1, 4]


def test_a_step_that_was_cut_while_generating_asks_for_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The resumed run trains on bitwise what an undisturbed one does, and shows its samples."""
    straight, recorded = run_in(tmp_path / "straight", engine=SeededEngine(seed=0))
    train(straight)
    policy = cut_while_generating(tmp_path / "cut")
    engine = SeededEngine(seed=9)
    run, memory = run_in(tmp_path / "cut", resume=True, start=1, engine=engine)
    run.policy.table = policy.table
    train(run, start=1)
    assert engine.asked == [1, 4]
    assert "Step 1: 3 of 4 prompts had been generated before" in capsys.readouterr().out
    assert torch.equal(run.policy.table, straight.policy.table)
    assert memory.values("train", "ratio/max") == recorded.values("train", "ratio/max")[1:]
    assert memory.samples == recorded.samples[1:] == [(1, 4), (2, 4)]
    assert not list((tmp_path / "cut" / "dump").glob("step_*"))


def test_a_request_to_stop_cuts_generation_short(tmp_path: Path) -> None:
    """The last checkpoint is of step 0, so step 1 is saved before the run stops; nothing that was finished is lost, and
    an engine that never answers holds nothing up."""
    engine = SeededEngine(seed=0)
    engine.survives, engine.hangs = (4 + 2) * SAMPLES, True
    run, memory = run_in(tmp_path, engine=engine, checkpoint={"every_steps": 0})
    run.source.stop = lambda: engine.asks_to_stop
    with pytest.raises(Stopped, match="after 1 steps"):
        train(run)
    assert memory.saved == [1] and len(memory.values("train", "reward/mean")) == 1
    assert dump_of(tmp_path).steps() == [] and finished_indices(dump_of(tmp_path).unfinished(1)) == {2, 3}
    engine.survives = 10**6
    again, _ = run_in(tmp_path, resume=True, start=1, engine=engine, checkpoint={"every_steps": 0})
    train(again, start=1)
    assert engine.asked == [4, 4, 2, 4]


def test_groups_of_other_sampling_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut_while_generating(tmp_path)
    engine = SeededEngine(seed=0)
    with caplog.at_level(logging.WARNING):
        train(run_in(tmp_path, resume=True, start=1, engine=engine, rollout={"top_k": 3})[0], start=1)
    assert engine.asked == [4, 4] and "is of another configuration or other weights" in caplog.text


def test_damaged_leftovers_are_generated_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path)
    dump_of(tmp_path).path(1).write_bytes(b"")
    engine = CountingEngine(seed=5)
    train(run_in(tmp_path, resume=True, start=1, engine=engine)[0], start=1)
    assert engine.answers == 8 * SAMPLES and "is damaged" in caplog.text


def test_a_fresh_start_forgets_leftovers(tmp_path: Path) -> None:
    interrupted(tmp_path)
    engine = CountingEngine(seed=5)
    train(run_in(tmp_path, engine=engine)[0])
    assert engine.answers == 12 * SAMPLES


def test_rollouts_that_an_earlier_version_stored_are_replayed(tmp_path: Path) -> None:
    """It called the environments data.tasks, and its files lack what batches have got since."""
    first, recorded = run_in(tmp_path / "a", storage={"dump": True})
    train(first)
    dump = dump_of(tmp_path / "a")
    for step in dump.steps():
        with np.load(dump.path(step)) as file:
            arrays = {name: file[name] for name in EARLIER_ARRAYS}
        origin = asdict(dump.origin(step))
        origin["settings"]["data.tasks"] = origin["settings"].pop("environments")
        np.savez(dump.path(step), origin=np.frombuffer(json.dumps(origin).encode(), np.uint8), **arrays)
    again, replayed = run_in(tmp_path / "b", storage={"replay": tmp_path / "a"})
    train(again)
    assert torch.equal(first.policy.table, again.policy.table)
    assert recorded.values("train", "reward/mean") == replayed.values("train", "reward/mean")
