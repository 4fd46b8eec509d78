"""Trajectories that are sampled beside the training: in which order, and with which weights."""

import asyncio
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fiberpo_megatron.interfaces import SamplingChange
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.sources.handover import AllEnded, GoesOn
from fiberpo_megatron.sources.stored import StoredRollouts, dump_of
from fiberpo_megatron.trainer.loop import Training, learn, train
from fiberpo_megatron.trainer.stop import Stopped, never
from fiberpo_megatron.types import Completion, RolloutBatch, flatten
from tests.trainer.test_loop import Memory, toy_config, training
from tests.trainer.toy import VOCABULARY, CountingPrompts, FakeEngine, SingleLayout, read

STEPS, PROMPTS, SAMPLES = 8, 6, 4


class Timed(FakeEngine):
    """A response depends on its seed and on the published weights alone; its length too, and it takes its time."""

    def __init__(self, timing: int, seconds: float = 0.002) -> None:
        super().__init__(seed=0)
        self.timing, self.seconds = random.Random(timing), seconds
        self.sampled = 0

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: object) -> list[Completion]:
        self.sampled += len(seeds)
        (seed,) = seeds
        length = 1 + seed % 3
        await asyncio.sleep(length * self.timing.random() * self.seconds)
        self.random.manual_seed(seed)
        return [self._one(prompt[-1], SamplingChange(max_response_tokens=length))]


def ahead(
    staleness: int, engine: Timed, *, drain: bool = True, folder: Path | None = None, start: int = 0, **sections: Any
) -> tuple[Training, Memory, list[RolloutBatch]]:
    """A run whose sampling goes ahead of its training, and the batches that it trains on."""
    batch = {"prompts": PROMPTS, "samples_per_prompt": SAMPLES, "mini_batches": 2, "micro_batch_tokens": 64}
    merged: dict[str, Any] = {
        "trainer": {"steps": STEPS},
        "batch": batch,
        "evaluation": {"prompts": 0},
        "rollout": {"staleness": staleness},
        "algorithm": {"advantage": "none"},
        **sections,
    }
    if folder is not None:
        merged["run"] = {"folder": folder}
    run, memory = training(engine=engine, **merged)
    taken: list[RolloutBatch] = []

    class Watched(EngineSource):
        def take(self, step: int, version: int | None = None) -> RolloutBatch | None:
            found = super().take(step, version)
            if found is not None:
                taken.append(found)
            return found

    given = {name: getattr(run.source, name) for name in EngineSource.__dataclass_fields__ if name[0] != "_"}
    source = Watched(**given)
    source.tickets = Tickets(PROMPTS, staleness, STEPS)
    source.handover = (lambda supply: AllEnded(supply.drain)) if drain else (lambda supply: GoesOn())
    if folder is not None:
        source.store = StoredRollouts(toy_config(**merged), VOCABULARY, SingleLayout(), start, start > 0)
    run.policy.learning_rate = 1.0  # type: ignore[attr-defined]
    return replace(run, source=source, staleness=staleness), memory, taken


def test_staleness_0_is_the_synchronous_loop():
    """Written out once more: publish, sample all groups of the step, learn."""
    run, _, _ = ahead(0, Timed(timing=1))
    train(run)
    plain, _, _ = ahead(0, Timed(timing=2))
    source = plain.source
    assert isinstance(source, EngineSource) and source.generator is not None
    for step in range(STEPS):
        source.publisher.publish(plain.policy.weights, str(step))
        prompts = read(CountingPrompts().prompts_at(0, step, PROMPTS))
        groups = dict(source.generator.groups(prompts, SAMPLES, str(step), never))
        learn(plain, flatten([groups[index] for index in range(PROMPTS)]), step)
    assert torch.equal(run.policy.table, plain.policy.table)


@pytest.mark.parametrize("staleness", [0, 2])
def test_ranks_are_as_patient_as_the_settings_say_wherever_they_wait_for_rollouts(staleness: int):
    """Without `patience_s` they would wait inside a collective, which ends after `run.distributed_timeout_s`."""
    waits: list[tuple[str, float]] = []

    class Patient(SingleLayout):
        def wait_for_all(self, where: str, deadline_s: float) -> None:
            waits.append((where, deadline_s))

    run, _, _ = ahead(staleness, Timed(timing=1), evaluation={"prompts": 4, "every_steps": STEPS})
    run.policy.layout = Patient()  # type: ignore[attr-defined]
    source = run.source
    assert isinstance(source, EngineSource)
    source.patience_s = 123.0
    train(run)
    evaluations = 2  # before the first step and after the last one
    publications = STEPS + 1
    wanted = {"generating rollouts": STEPS + evaluations, "waiting for all trajectories to end": publications}
    assert {where: sum(1 for one, _ in waits if one == where) for where in wanted} == wanted
    assert {deadline for where, deadline in waits if where in wanted} == {123.0}


def test_drain_repeats_bitwise_whatever_the_timing_and_a_trajectory_has_one_version():
    first, memory, taken = ahead(2, Timed(timing=1))
    train(first)
    for timing in (2, 3):
        again, others, _ = ahead(2, Timed(timing))
        train(again)
        assert torch.equal(first.policy.table, again.policy.table)
        for name in ("gradient_norm", "reward/mean", "lag/mean", "importance/weight"):
            assert memory.values("train", name) == others.values("train", name)
    for step, batch in enumerate(taken):
        assert set(batch.weight_versions[batch.response_mask].tolist()) == {max(0, step - 2)}
    assert memory.values("train", "lag/max") == [0, 1, *[2] * (STEPS - 2)]
    synchronous, _, _ = ahead(0, Timed(timing=1))
    train(synchronous)
    assert not torch.equal(first.policy.table, synchronous.policy.table)


@pytest.mark.parametrize("staleness", [1, 3])
def test_no_token_is_older_than_allowed_and_every_ticket_is_trained_once(staleness: int):
    """Requests go on while weights are published, so that which weights sample a token depends on timing."""
    run, memory, taken = ahead(staleness, Timed(timing=4), drain=False)
    train(run)
    for step, batch in enumerate(taken):
        lags = step - batch.weight_versions[batch.response_mask]
        assert lags.min() >= 0 and lags.max() <= staleness
        asked = [place.index for place in CountingPrompts().prompts_at(0, step, PROMPTS)]
        first = batch.tokens[batch.offsets[:-1]][::SAMPLES]
        assert first.tolist() == [index % VOCABULARY for index in asked]
    assert len(taken) == STEPS and run.source.sampler.sampled == STEPS * PROMPTS * SAMPLES  # type: ignore[attr-defined]
    assert max(memory.values("train", "lag/max")) >= 1


def test_sampling_goes_on_while_the_trainer_trains():
    """The engine has begun the next step before the first one has been trained."""
    engine = Timed(timing=0)
    run, _, _ = ahead(1, engine)
    seen: list[int] = []
    step = run.policy.step

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(engine.sampled)
        return step(*arguments, **named)

    run.policy.step = watched  # type: ignore[method-assign]
    train(run)
    assert seen[0] == 2 * PROMPTS * SAMPLES


def test_a_request_to_stop_ends_the_wait_for_other_trajectories_and_keeps_what_has_ended(tmp_path: Path):
    class Hangs(Timed):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: object) -> list[Completion]:
            if self.sampled >= (2 * PROMPTS + 2) * SAMPLES:
                asked.set()
                await asyncio.Event().wait()
            return await super().sample(prompt, seeds, **limits)

    asked = threading.Event()
    run, memory, taken = ahead(1, Hangs(timing=0), folder=tmp_path)
    run.source.stop = asked.is_set  # type: ignore[attr-defined]
    with pytest.raises(Stopped) as stopped:
        train(run)
    run.source.close()  # type: ignore[attr-defined]
    done = stopped.value.done
    assert 0 < done < STEPS and memory.saved[-1] == done
    again, _, further = ahead(1, Timed(timing=5), folder=tmp_path, start=done)
    again.policy.table = run.policy.table  # type: ignore[misc]
    train(again, start=done)
    again.source.close()  # type: ignore[attr-defined]
    assert len(taken) + len(further) == STEPS and dump_of(tmp_path).steps() == []
    straight, _, _ = ahead(1, Timed(timing=6))
    train(straight)
    assert torch.equal(again.policy.table, straight.policy.table)
