"""The loop on stored rollouts: replay without an engine, and steps that an interrupted run had generated."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fiberpo_megatron.engines.errors import SamplingStopped
from fiberpo_megatron.rollout.dump import DumpError
from fiberpo_megatron.rollout.finished import finished_indices
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.stop import Stopped
from fiberpo_megatron.trainer.stored import StoredRollouts, dump_of
from fiberpo_megatron.types import Completion
from tests.trainer.test_loop import Memory, training
from tests.trainer.toy import VOCABULARY, FakeEngine, SingleLayout, TablePolicy


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
    run, memory = training(engine=engine, **merged)
    store = StoredRollouts(run.config, VOCABULARY, layout or SingleLayout(), start, resume)
    if run.config.storage.replay is not None:
        return replace(run, rollouts=store, generator=None, publisher=None), memory
    return replace(run, rollouts=store), memory


def test_a_replayed_run_is_the_run_that_was_dumped(tmp_path: Path) -> None:
    first, recorded = run_in(tmp_path / "a", rollouts={"dump": True})
    train(first)
    again, replayed = run_in(tmp_path / "b", rollouts={"replay": tmp_path / "a"})
    train(again)
    assert torch.equal(first.policy.table, again.policy.table)
    for name in ("reward/mean", "gradient_norm", "rollout_diff/max", "ratio/max"):
        assert recorded.values("train", name) == replayed.values("train", name)
    assert not (tmp_path / "b").exists()  # nothing is generated, so nothing is stored


def test_another_objective_on_the_same_data(tmp_path: Path) -> None:
    first, recorded = run_in(tmp_path / "a", rollouts={"dump": True})
    train(first)
    other, replayed = run_in(
        tmp_path / "b", rollouts={"replay": tmp_path / "a" / "dump"}, algorithm={"advantage": "none"}
    )
    train(other)
    assert recorded.values("train", "reward/mean") == replayed.values("train", "reward/mean")
    assert not torch.equal(first.policy.table, other.policy.table)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainer": {"steps": 4}}, r"no rollouts of step 3; it has 3 steps from 0 to 2; lower trainer\.steps"),
        ({"rollout": {"temperature": 0.5}}, r"made with rollout\.temperature = 1\.0 \(this run: 0\.5\)"),
        ({"data": {"tasks": [{"kind": "sort"}]}}, r"data\.tasks = \['addition'\] \(this run: \['sort'\]\)"),
        ({"algorithm": {"routing_replay": "rollout"}}, "has no expert routing"),
    ],
    ids=["steps", "temperature", "tasks", "routing"],
)
def test_rollouts_of_another_setting_are_refused(tmp_path: Path, sections: dict[str, object], message: str) -> None:
    first, _ = run_in(tmp_path / "a", rollouts={"dump": True})
    train(first)
    with pytest.raises(DumpError, match=message):
        train(run_in(tmp_path / "b", **{"storage": {"replay": tmp_path / "a"}, **sections})[0])


def test_rollouts_of_other_prompts_are_refused(tmp_path: Path) -> None:
    first, _ = run_in(tmp_path / "a", rollouts={"dump": True})
    train(first)
    again, memory = run_in(tmp_path / "b", rollouts={"replay": tmp_path / "a"})
    prompts_at = again.prompts.prompts_at
    again.prompts.prompts_at = lambda seed, step, count: prompts_at(seed, step + (step == 1), count)
    with pytest.raises(DumpError, match=r"step_000001\.npz holds rollouts of other prompts than this run's step 1"):
        train(again)
    assert memory.saved == [1]


class Killed(Exception):
    """Stands for a kill: nothing after it happens."""


class CountingEngine(FakeEngine):
    """Counts requests; its randomness is not that of an earlier engine."""

    calls = 0

    def sample(self, *args: object, **options: object) -> object:
        self.calls += 1
        return super().sample(*args, **options)


class SeededEngine(FakeEngine):
    """What it samples depends on the weights and the prompt's seed alone; the last prompt ends first. It dies after
    `survives` prompts."""

    survives = 10**6

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked: list[int] = []
        """Prompts of each request."""

    def sample(
        self, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int], stop: Callable[[], bool]
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.asked.append(len(prompts))
        for index in reversed(range(len(prompts))):
            if stop():
                raise SamplingStopped
            if self.survives == 0:
                raise Killed
            self.survives -= 1
            self.random.manual_seed(seeds[index])
            yield index, [self._one(prompts[index][-1]) for _ in range(count)]


def cut_while_generating(folder: Path) -> TablePolicy:
    """Of step 1's four prompts three are generated; the policy that would have sampled the fourth."""
    engine = SeededEngine(seed=0)
    engine.survives = 4 + 3
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
    assert engine.calls == 1  # step 2 only
    assert memory.values("train", "reward/mean")[0] == float(kept.rewards.mean())
    assert dump_of(tmp_path).steps() == []


def test_loaded_weights_are_the_same_whatever_happens_to_them_now(tmp_path: Path) -> None:
    interrupted(tmp_path)
    engine, layout = CountingEngine(seed=5), SingleLayout()
    layout.world_size = 2
    change = {"optimizer": {"learning_rate": 1.0}, "parallel": {"data": 2}}
    train(run_in(tmp_path, resume=True, start=1, engine=engine, layout=layout, **change)[0], start=1)
    assert engine.calls == 1


@pytest.mark.parametrize("change", [{"rollout": {"top_p": 0.9}}, {"storage": {"unfinished": False}}], ids=str)
def test_an_interrupted_step_of_other_sampling_is_generated_again(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path)
    engine = CountingEngine(seed=5)
    with caplog.at_level(logging.WARNING):
        train(run_in(tmp_path, resume=True, start=1, engine=engine, **change)[0], start=1)
    assert engine.calls == 2
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
    """The last checkpoint is of step 0, so step 1 is saved before the run stops; nothing that was finished is lost."""
    engine = SeededEngine(seed=0)
    run, memory = run_in(tmp_path, engine=engine, checkpoint={"every_steps": 0})
    questions = iter(range(100))  # four a step by the engine, one after the rollouts, one at the end of the step
    with pytest.raises(Stopped, match="after 1 steps"):
        train(replace(run, stop=lambda: next(questions) >= 6 + 2))
    assert memory.saved == [1] and len(memory.values("train", "reward/mean")) == 1
    assert dump_of(tmp_path).steps() == [] and finished_indices(dump_of(tmp_path).unfinished(1)) == {2, 3}
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
    assert engine.calls == 2 and "is damaged" in caplog.text


def test_a_fresh_start_forgets_leftovers(tmp_path: Path) -> None:
    interrupted(tmp_path)
    engine = CountingEngine(seed=5)
    train(run_in(tmp_path, engine=engine)[0])
    assert engine.calls == 3
