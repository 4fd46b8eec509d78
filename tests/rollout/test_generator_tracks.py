"""What a generator notes of its trajectories, on a clock that only the toy engine and the toy environments move."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fiberpo_megatron.environments import Conversation, Environment, Outcome, Task, Trajectory, Turn
from fiberpo_megatron.rollout.generator import Generator, Sampled
from fiberpo_megatron.tracks import Timeline, Track
from fiberpo_megatron.types import Completion
from tests.rollout.test_generator import PROMPTS, Seeded, never
from tests.trainer.toy import FirstToken, Words, generator

QUEUE_S, SAMPLE_S, ENVIRONMENT_S, GROUP_S, SCORE_S = 1.0, 2.0, 4.0, 8.0, 16.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Seeded):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **options: Any) -> list[Completion]:
        track: Track = options["track"]
        with track.phase("queued"):
            self.clock.now += QUEUE_S
            with track.request(0) as answer:
                self.clock.now += SAMPLE_S
                answer.tokens = 3
                return await super().sample(prompt, seeds, **options)


class Scored(FirstToken):
    clock: Clock

    def score(self, task: Task, turn: Turn) -> float:
        self.clock.now += ENVIRONMENT_S
        return 1.0


class TwoTurns(Environment):
    train_size = 10**6
    clock: Clock

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        await policy.say(task.prompt)
        self.clock.now += ENVIRONMENT_S
        await policy.say({"role": "user", "content": "again"})
        self.clock.now += ENVIRONMENT_S
        return Outcome(1.0)


class ByGroup(TwoTurns):
    def score_group(self, task: Task, trajectories: Sequence[Trajectory]) -> Sequence[Outcome]:
        self.clock.now += GROUP_S
        return [Outcome(1.0) for _ in trajectories]


class SlowScorer:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    async def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        self.clock.now += SCORE_S
        return np.zeros(len(response), np.float32)


def made(environment: Any, samples: int = 1, *, scored: bool = False, step: int | None = 5) -> list[Track]:
    clock = environment.clock = Clock()
    found: Generator = replace(
        generator(Slow(clock), environment, encoder=Words((7,))),
        timeline=Timeline(clock),
        scorers={"teacher_log_probs": SlowScorer(clock)} if scored else {},
    )
    groups = found.begin({0: PROMPTS[3]}, samples, Sampled("0", frozenset("0"), step=step))
    assert len(list(groups.finished(never))) == 1
    return found.timeline.take(5)


def seconds(track: Track) -> dict[str, float]:
    return {phase: found for phase, found in track.seconds.items() if found}


def test_an_answer_is_queued_sampled_and_scored_by_its_environment():
    (track,) = made(Scored())
    assert track.name == "toy/3" and track.sample == 0 and track.tokens == 3
    assert seconds(track) == {"queued": QUEUE_S, "sampling": SAMPLE_S, "environment": ENVIRONMENT_S}
    assert track.ended == QUEUE_S + SAMPLE_S + ENVIRONMENT_S


def test_a_conversation_is_in_its_environment_except_while_the_policy_answers():
    (track,) = made(TwoTurns())
    assert seconds(track) == {"queued": 2 * QUEUE_S, "sampling": 2 * SAMPLE_S, "environment": 2 * ENVIRONMENT_S}
    assert [phase for phase, _, _ in track.facts()["stretches"]] == 2 * ["queued", "sampling", "environment"]


def test_scores_of_other_models_have_a_phase_of_their_own():
    (track,) = made(Scored(), scored=True)
    assert seconds(track)["scoring"] == SCORE_S and track.ended == QUEUE_S + SAMPLE_S + ENVIRONMENT_S + SCORE_S


def test_samples_that_are_scored_together_wait_for_each_other_and_end_together():
    """In the toy the second sample is made after the first one."""
    first, second = made(ByGroup(), samples=2)
    one = 2 * (QUEUE_S + SAMPLE_S + ENVIRONMENT_S)
    assert first.ended == second.ended == 2 * one + GROUP_S
    for track in (first, second):
        assert seconds(track)["environment"] == 2 * ENVIRONMENT_S + GROUP_S
        assert seconds(track)["idle"] == one, "while the other one is made"


def test_nobody_keeps_the_tracks_of_an_evaluation():
    assert made(Scored(), step=None) == []


def test_a_conversation_waits_in_the_queue_until_a_worker_takes_it():
    environment = TwoTurns()
    clock = Clock()

    found: Generator = replace(generator(Slow(clock), environment, encoder=Words((7,))), timeline=Timeline(clock))
    environment.clock = clock
    pool = found.environments[0].pool
    run = pool.run

    async def late(*arguments: Any, **named: Any) -> Any:
        clock.now += 32
        return await run(*arguments, **named)

    pool.run = late  # type: ignore[method-assign]
    list(found.begin({0: PROMPTS[3]}, 1, Sampled("0", frozenset("0"), step=5)).finished(never))
    (track,) = found.timeline.take(5)
    assert seconds(track)["queued"] == 32 + 2 * QUEUE_S


def test_an_environment_that_fails_ends_the_trajectory_as_well():
    class Fails(TwoTurns):
        async def run(self, task: Task, policy: Conversation) -> Outcome:
            raise ArithmeticError("no")

    environment = Fails()
    clock = environment.clock = Clock()
    found = replace(
        generator(Slow(clock), environment, encoder=Words((7,)), on_failure="drop"), timeline=Timeline(clock)
    )
    list(found.begin({0: PROMPTS[3]}, 1, Sampled("0", frozenset("0"), step=5)).finished(never))
    (track,) = found.timeline.take(5)
    assert track.ended == 0 and track.tokens == 0
