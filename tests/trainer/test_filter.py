"""Groups without a difference are dropped and replaced; which are trained on is a pure function of how groups ended."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.data.curriculum import build_prompts
from fiberpo_megatron.data.prompts import Domain, PromptSets
from fiberpo_megatron.data.settings import DataConfig
from fiberpo_megatron.environments import SingleTurn, Task, Turn
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.rollout.filter import Filter
from fiberpo_megatron.rollout.generator import Sampled
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.sources.replay import ReplaySource
from fiberpo_megatron.sources.stored import StoredRollouts, dump_of
from fiberpo_megatron.sources.supply import Supply
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.batch import mini_batches
from fiberpo_megatron.trainer.loop import Training, learn, train
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.trainer.stop import Stopped, never
from fiberpo_megatron.types import Completion, RolloutBatch, RolloutGroup, flatten, named_arrays
from tests.rollout.groups import group
from tests.trainer.leaders import on_leaders
from tests.trainer.test_loop import Memory, toy_config
from tests.trainer.test_supply import PROMPTS, SAMPLES, STEPS, Timed, ahead
from tests.trainer.toy import (
    LOOP,
    VOCABULARY,
    CountingPrompts,
    FirstToken,
    NothingStored,
    SingleLayout,
    generator,
    read,
)

OVERSAMPLE, REFILLS = 1.5, 6
OWNED = 9
"""Prompts that a step draws: 1.5 x PROMPTS."""
BATCH = {"prompts": PROMPTS, "samples_per_prompt": SAMPLES, "mini_batches": 2, "micro_batch_tokens": 64}
FILTERED = {**BATCH, "filter": {"on": "reward", "oversample": OVERSAMPLE, "max_refills": REFILLS}}
FILTER = Filter("reward", PROMPTS, OWNED, REFILLS)


def filtered(
    engine: Timed,
    staleness: int = 0,
    *,
    folder: Path | None = None,
    start: int = 0,
    prompts: PromptSets | None = None,
    **sections: Any,
) -> tuple[Training, Memory, list[RolloutBatch]]:
    """A run with the filter, and the batches that it trains on."""
    run, memory, taken = ahead(staleness, engine, folder=folder, start=start, batch=FILTERED, **sections)
    source: Any = run.source
    source.filter, source.prompts_per_step = FILTER, OWNED
    source.tickets = Tickets(OWNED, staleness, STEPS)
    if prompts is not None:
        source.prompts = prompts
    return run, memory, taken


def adaptive() -> PromptSets:
    domains = [Domain("counting", 1.0, 10**6, 10**6), Domain("other", 1.0, 10**6, 10**6)]
    return build_prompts(DataConfig(curriculum="adaptive", curriculum_rate=0.5), domains)


def test_prompts_that_a_step_draws():
    assert BatchConfig.model_validate(FILTERED).drawn_prompts == OWNED == FILTER.owned
    assert BatchConfig(prompts=10, filter={"oversample": 1.1}).drawn_prompts == 11  # 1.1 * 10 is above 11 in floats
    assert BatchConfig(prompts=7, filter={"oversample": 1.01}).drawn_prompts == 8
    assert BatchConfig(prompts=7).drawn_prompts == 7
    with pytest.raises(ValueError, match=r"samples_per_prompt = 1: no group of one trajectory differs"):
        BatchConfig(samples_per_prompt=1, filter={})


def test_the_loop_written_out_once_more_takes_the_same_groups():
    """One group after the other, in the order of tickets and refills, until enough of them differ."""
    run, memory, taken = filtered(Timed(timing=1))
    train(run)
    plain, _, _ = filtered(Timed(timing=2))
    source = plain.source
    assert isinstance(source, EngineSource) and source.generator is not None
    refilled = 0.0
    for step in range(STEPS):
        source.publisher.publish(plain.policy.weights, str(step))
        prompts = CountingPrompts()
        places = [*prompts.prompts_at(0, step, OWNED), *prompts.refills_at(0, step, REFILLS)]
        useful: list[RolloutGroup] = []
        for number, prompt in enumerate(read(places)):
            name = f"{step} refill" if number >= OWNED else str(step)
            one = source.generator.loop.run(
                source.generator.group(prompt, SAMPLES, Sampled(name, frozenset([str(step)])))
            )
            if len({trajectory.reward for trajectory in one.trajectories}) > 1:
                useful.append(one)
            if len(useful) == PROMPTS:
                break
        dropped = number + 1 - len(useful)
        assert memory.values("train", "filter/dropped_groups")[step] == dropped
        assert memory.values("train", "filter/refilled_groups")[step] == max(0, number + 1 - OWNED)
        assert memory.values("train", "filter/aborted_groups")[step] == max(0, OWNED - number - 1)
        assert memory.values("train", "filter/missing_share")[step] == 1 - len(useful) / PROMPTS
        assert taken[step].tokens.tolist() == flatten(useful).tokens.tolist()
        refilled += max(0, number + 1 - OWNED)
        learn(plain, flatten(useful), step)
    assert torch.equal(run.policy.table, plain.policy.table) and refilled > 0


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_choice_does_not_depend_on_which_group_ends_first(staleness: int):
    first, memory, taken = filtered(Timed(timing=1, seconds=0.0), staleness)
    train(first)
    for timing in (2, 3):  # so slow that the choice is asked for while some have ended and others have not
        again, others, _ = filtered(Timed(timing, seconds=0.03), staleness)
        train(again)
        assert torch.equal(first.policy.table, again.policy.table)
        for kind, step, metrics in others.records:
            same = next(found for k, s, found in memory.records if (k, s) == (kind, step))
            assert {n: v for n, v in same.items() if "filter/" in n} == {
                n: v for n, v in metrics.items() if "filter/" in n
            }
    for step, batch in enumerate(taken):
        versions = set(batch.weight_versions[batch.response_mask].tolist())
        assert versions <= {max(0, step - staleness), step}  # a refill is drawn when the step's turn has come
    assert not staleness or any(value > 0 for value in memory.values("train", "filter/refilled_groups"))


def supply(layout: Layout, engine: Timed, prompts: PromptSets, memory: Any, filter: Filter = FILTER) -> Supply:
    """What makes the groups of one leader; its engine has weights that no run has trained."""
    engine.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
    engine.version = "0"
    return Supply(
        layout=layout,
        prompts=prompts,
        read=read,
        generator=generator(engine, FirstToken()),
        store=NothingStored(),
        recorder=memory,
        timers=PhaseTimers(),
        seed=0,
        tickets=Tickets(OWNED, 0, STEPS),
        samples_per_prompt=SAMPLES,
        patience_s=60.0,
        stop=never,
        filter=filter,
    )


class Places(Memory):
    """Remembers what was written for people."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, list[tuple[int, int]]] = {}
        self.counted: dict[int, int] = {}

    def rollouts(
        self, step: int, groups: Any, kind: str = "train", *, places: Any = None, looked_at: Any = None
    ) -> None:
        self.written[step] = [(place, one.prompt.token_ids[0]) for place, one in zip(places, groups, strict=True)]
        self.counted[step] = len(looked_at)


@pytest.mark.parametrize("leaders", [2, 3])
def test_several_leaders_take_the_groups_that_one_takes(leaders: int):
    steps = 4

    def taken(layout: SingleLayout) -> list[tuple[RolloutBatch, dict[str, float], Places, dict[str, float]]]:
        prompts, memory, found = adaptive(), Places(), []
        one = supply(layout, Timed(10 + layout.rank), prompts, memory)
        for step in range(steps):
            one.admit(step, version=0)
            batch = one.take(step)
            assert batch is not None and one.filtered is not None
            found.append((batch, one.filtered.metrics(), memory, prompts.observe(batch, one.filtered.solved)))
        return found

    (alone,) = on_leaders(1, taken)
    assert any(metrics["filter/refilled_groups"] > 1 for _, metrics, _, _ in alone)
    shared = on_leaders(leaders, taken)
    for ranks in shared:
        for (batch, metrics, _, curriculum), (expected, wanted, _, solved) in zip(ranks, alone, strict=True):
            assert metrics == wanted and curriculum == solved
            for name, array in named_arrays(expected).items():
                assert np.array_equal(named_arrays(batch)[name], array, equal_nan=array.dtype.kind == "f"), name
    for step in range(steps):  # places in the batch, whichever leader has the group
        assert sorted(p for rank in shared for p in rank[0][2].written[step]) == alone[0][2].written[step]
        assert sum(rank[0][2].counted[step] for rank in shared) == alone[0][2].counted[step]


class Killed(Exception):
    """Stands for a kill: nothing after it happens."""


class Dies(Timed):
    """After so many answers the process is killed."""

    def __init__(self, timing: int, survives: int) -> None:
        super().__init__(timing)
        self.survives = survives

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: Any) -> list[Completion]:
        found = await super().sample(prompt, seeds, **limits)
        self.survives -= 1
        if self.survives < 0:
            await asyncio.sleep(0.01)  # what has ended is scored and kept
            raise Killed
        return found


def test_a_run_that_is_killed_at_any_time_goes_on_as_if_it_had_not_been(tmp_path: Path):
    """Tickets and refills that have ended are not asked for again, and the same groups are chosen."""
    straight, recorded, _ = filtered(Timed(timing=1))
    train(straight)
    asked = straight.source.sampler.sampled  # type: ignore[attr-defined]
    answers, again_asked, in_refills = range(40, asked - 80, 61), [], 0
    for place, survives in enumerate(answers):
        folder = tmp_path / str(place)
        run, memory, _ = filtered(Dies(place, survives), folder=folder)
        with pytest.raises(Killed):
            train(run)
        done = memory.saved[-1] if memory.saved else 0
        in_refills += any((dump_of(folder).unfinished(done) / "refills").glob("rank_*"))
        again, further, _ = filtered(Timed(timing=50 + place), folder=folder, start=done)
        again.policy.table = run.policy.table  # type: ignore[misc]
        train(again, start=done)
        assert torch.equal(again.policy.table, straight.policy.table), survives
        for name in ("filter/dropped_groups", "filter/refilled_groups", "filter/accuracy", "reward/mean"):
            assert further.values("train", name) == recorded.values("train", name)[done:]
        again_asked.append(again.source.sampler.sampled)  # type: ignore[attr-defined]
    assert in_refills > 0 and again_asked == sorted(again_asked, reverse=True)


def test_a_step_that_was_taken_and_not_saved_is_trained_on_after_a_kill(tmp_path: Path):
    """Its trajectories are on disk, with what the curriculum has to see of the dropped ones."""
    straight, recorded, _ = filtered(Timed(timing=1), prompts=adaptive())
    train(straight)
    run, memory, _ = filtered(Timed(timing=2), folder=tmp_path, prompts=adaptive())
    states: dict[int, Any] = {}
    tables: dict[int, torch.Tensor] = {}
    save, step, steps = memory.save, run.policy.step, []

    def noted(policy: Any, done: int, *, prompts: Any, **about: Any) -> None:
        states[done], tables[done] = json.loads(json.dumps(prompts)), policy.table.detach().clone()
        save(policy, done, prompts=prompts, **about)

    def dying(*arguments: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) > 7:  # the second optimiser step of training step 3
            raise Killed
        return step(*arguments, **named)

    memory.save, run.policy.step = noted, dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(run)
    assert memory.saved[-1] == 3 and dump_of(tmp_path).steps() == [3]
    prompts = adaptive()
    prompts.restore(states[3])
    again, further, _ = filtered(Timed(timing=3), folder=tmp_path, start=3, prompts=prompts)
    again.policy.table = tables[3].requires_grad_()  # type: ignore[misc]
    train(again, start=3)
    assert torch.equal(again.policy.table, straight.policy.table)
    for name in ("filter/dropped_groups", "filter/refilled_groups", "filter/accuracy", "curriculum/solve_rate/other"):
        assert further.values("train", name) == recorded.values("train", name)[3:]


def test_a_replay_trains_on_the_same_groups(tmp_path: Path):
    """The curriculum sees the groups that were dropped as well, from what is stored of them."""
    run, recorded, _ = filtered(Timed(timing=1), folder=tmp_path / "a", storage={"dump": True}, prompts=adaptive())
    train(run)
    options = {"storage": {"replay": tmp_path / "a"}, "batch": FILTERED, "trainer": {"steps": STEPS}}
    config = toy_config(run={"folder": tmp_path / "b"}, evaluation={"prompts": 0}, **options)
    store = StoredRollouts(config, VOCABULARY, SingleLayout(), 0, False)
    again, replayed, _ = filtered(Timed(timing=2))
    source = ReplaySource(SingleLayout(), adaptive(), read, store, PhaseTimers(), 0, OWNED, True)
    train(replace(again, source=source))
    assert torch.equal(run.policy.table, again.policy.table)
    for name in ("filter/dropped_groups", "filter/accuracy", "curriculum/solve_rate/other", "gradient_norm"):
        assert recorded.values("train", name) == replayed.values("train", name)
    other = toy_config(run={"folder": tmp_path / "c"}, evaluation={"prompts": 0}, **{**options, "batch": BATCH})
    with pytest.raises(ValueError, match=r"batch\.filter = \{.*\} \(this run: None\)"):
        StoredRollouts(other, VOCABULARY, SingleLayout(), 0, False)


class Never(SingleTurn):
    """No answer is right."""

    train_size = held_out_size = 10**6

    def score(self, task: Task, turn: Turn) -> float:
        return 0.0


def test_a_step_without_a_useful_group_trains_on_nothing_and_the_run_goes_on(tmp_path: Path):
    run, memory, taken = filtered(Timed(timing=0), folder=tmp_path, storage={"dump": True})
    engine: Any = run.source.sampler  # type: ignore[attr-defined]
    run.source.generator = generator(engine, Never())  # type: ignore[attr-defined]
    before = run.policy.table.detach().clone()
    with pytest.warns(UserWarning, match=r"step 0: in none of its 15 groups, 6 refills among them, does what batch"):
        train(run)
    assert torch.equal(run.policy.table, before) and engine.version == str(STEPS)
    assert memory.values("train", "filter/steps_without_training") == [1.0] * STEPS
    assert memory.values("train", "filter/missing_share") == [1.0] * STEPS
    assert memory.values("train", "filter/accuracy") == [0.0] * STEPS
    assert all("reward/mean" not in metrics for kind, _, metrics in memory.records if kind == "train")
    assert all(not len(batch.lengths) for batch in taken) and memory.saved[-1] == STEPS
    config = toy_config(
        run={"folder": tmp_path / "b"}, batch=FILTERED, storage={"replay": tmp_path}, trainer={"steps": STEPS}
    )
    store = StoredRollouts(config, VOCABULARY, SingleLayout(), 0, False)
    again, replayed, _ = filtered(Timed(timing=0))
    train(
        replace(
            again, source=ReplaySource(SingleLayout(), CountingPrompts(), read, store, PhaseTimers(), 0, OWNED, True)
        )
    )
    assert replayed.values("train", "filter/steps_without_training") == [1.0] * STEPS


def test_groups_that_failed_are_replaced_and_a_step_all_of_which_failed_ends_the_run():
    class Fails(FirstToken):
        everything = False

        def score(self, task: Task, turn: Turn) -> Any:
            if self.everything or int(task.answer or 0) % 3 == 0:
                raise RuntimeError("broken")
            return super().score(task, turn)

    run, memory, taken = filtered(Timed(timing=0))
    engine: Any = run.source.sampler  # type: ignore[attr-defined]
    run.source.generator = generator(engine, Fails(), on_failure="drop")  # type: ignore[attr-defined]
    train(run)
    begins = [set(((batch.tokens[batch.offsets[:-1]] + 1) % VOCABULARY % 3).tolist()) for batch in taken]
    assert all(0 not in found for found in begins) and sum(memory.values("train", "filter/dropped_groups")) > 0
    Fails.everything = True
    with pytest.raises(RuntimeError, match="all 60 trajectories were dropped, because their environments failed"):
        broken, _, _ = filtered(Timed(timing=0))
        engine = broken.source.sampler  # type: ignore[attr-defined]
        broken.source.generator = generator(engine, Fails(), on_failure="drop")  # type: ignore[attr-defined]
        train(broken)


class Hangs(Timed):
    """Nothing comes of the requests from one priority on: nobody may wait for them."""

    first, cancelled = 10**6, 0

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: Any) -> list[Completion]:
        if limits["priority"] >= self.first:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return await super().sample(prompt, seeds, **limits)


def test_what_is_not_needed_is_aborted():
    few = replace(FILTER, wanted=1)
    engine = Hangs(timing=0)
    straight = supply(SingleLayout(), engine, CountingPrompts(), Places(), few)
    straight.admit(0, version=0)
    whole = straight.take(0)
    assert whole is not None and straight.filtered is not None and straight.filtered.looked_at < OWNED
    engine.first = straight.filtered.looked_at
    again = supply(SingleLayout(), engine, CountingPrompts(), Places(), few)
    again.admit(0, version=0)
    found = again.take(0)
    assert found is not None and found.tokens.tolist() == whole.tokens.tolist()
    assert again.filtered == straight.filtered
    LOOP.run(asyncio.sleep(0.05))  # what was cancelled ends
    assert engine.cancelled == (OWNED - engine.first) * SAMPLES


class Backwards(Timed):
    """The first three prompts of a step take far longer than the others."""

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: Any) -> list[Completion]:
        await asyncio.sleep(0.3 if limits["priority"] < 3 else 0.0)
        return await super().sample(prompt, seeds, **limits)


def test_a_group_that_ends_early_does_not_take_the_place_of_a_lower_ticket():
    found = []
    for engine in (Timed(0), Backwards(0)):
        one = supply(SingleLayout(), engine, CountingPrompts(), Places(), replace(FILTER, wanted=3))
        engine.table = 2.5 * torch.eye(VOCABULARY).roll(1, 1)  # half of the answers are right
        one.admit(0, version=0)
        batch = one.take(0)
        assert batch is not None and one.filtered is not None and min(one.filtered.chosen) < 3
        found.append((batch.tokens.tolist(), one.filtered))
    assert found[0] == found[1]


def test_a_request_to_stop_ends_the_wait_and_a_late_group_is_named(tmp_path: Path):
    class Silent(Timed):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: Any) -> list[Completion]:
            if self.sampled >= OWNED * SAMPLES + 3:
                asked.set()
                await asyncio.Event().wait()
            return await super().sample(prompt, seeds, **limits)

    asked = threading.Event()
    run, memory, _ = filtered(Silent(timing=0), folder=tmp_path)
    run.source.stop = asked.is_set  # type: ignore[attr-defined]
    with pytest.raises(Stopped):
        train(run)
    late, _, _ = filtered(Silent(timing=0))
    late.source.patience_s = 0.5  # type: ignore[attr-defined]
    with pytest.raises(TimeoutError, match=r"step [01]: \d+ of \d+ groups have not ended 0\.5 s after the step's turn"):
        train(late)


def test_short_steps_weigh_what_they_have():
    """A step of three groups in place of six is that of a batch of three: mu is 1 over its own trajectories."""
    groups = [group((0.0, 1.0), (False, True), index=i) for i in range(3)]
    batch = BatchConfig.model_validate({**FILTERED, "samples_per_prompt": 2})
    for size in (1, 2):
        layouts = [one_of(rank, size) for rank in range(size)]
        rollouts = flatten(groups)
        parts = [
            mini_batches(
                rollouts,
                np.ones(6, np.float32),
                batch=batch,
                weighting="seq-mean",
                domains=1,
                layout=layout,
                version=0,
            )
            for layout in layouts
        ]
        weights = [sorted(w for of_rank in parts for w in of_rank[m].weights.tolist()) for m in range(2)]
        assert [len(w) for w in weights] == [4, 2]
        assert weights == [[0.25] * 4, [0.5] * 2]


def one_of(rank: int, size: int) -> SingleLayout:
    layout = SingleLayout()
    layout.rank = layout.data_rank = rank
    layout.world_size = layout.data_size = size
    return layout
