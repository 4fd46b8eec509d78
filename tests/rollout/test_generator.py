"""Prompts in, scored groups out: seeds, order, stop requests, the first error, and what becomes of failures."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.errors import EngineRefused
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.environments import Conversation, Environment, Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.environments import Trajectory as EnvironmentTrajectory
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.host import EnvironmentFailed, Failure
from fiberpo_megatron.interfaces import SamplingChange, Segments
from fiberpo_megatron.rollout.conversation import response_seeds
from fiberpo_megatron.rollout.generator import Generator, share
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import Completion, Prompt, RolloutGroup, WeightSpan
from tests.engines.fake_server import FakeServers
from tests.trainer.toy import LOOP, FirstToken, InProcess, Words, generator, one_prompt, running

PROMPTS = [one_prompt(index) for index in range(7)]


def never() -> bool:
    return False


class Seeded:
    """An engine whose answer is a function of the prompt and the seed, and what it was asked."""

    def __init__(self, answer: Callable[[Sequence[int], int], Sequence[int]] | None = None, version: str = "0") -> None:
        self.answer = answer or (lambda prompt, seed: (seed % 12, len(prompt), prompt[-1]))
        self.version = version
        self.asked: list[tuple[list[int], list[int]]] = []

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
        priority: int = 0,
        track: Track | None = None,
        known_routes: int = 0,
        segments: Segments | None = None,
    ) -> list[Completion]:
        self.asked.append((list(prompt), list(seeds)))
        return [self._one(tuple(self.answer(prompt, seed))) for seed in seeds]

    def _one(self, tokens: tuple[int, ...]) -> Completion:
        log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        return Completion(tokens, log_probs, "stop", (WeightSpan(self.version, 0, len(tokens)),))

    def score(self, token_ids: Sequence[int]) -> dict[int, Any]:
        raise AssertionError("nobody asks for scores")


def groups_of(
    found: Generator, prompts: Sequence[Prompt] = PROMPTS, count: int = 3, version: str = "0"
) -> dict[int, RolloutGroup]:
    groups = list(found.groups(prompts, count, version, never))
    assert sorted(index for index, _ in groups) == list(range(len(prompts))), "each prompt once"
    return dict(groups)


def tokens(group: RolloutGroup) -> list[tuple[int, ...]]:
    return [trajectory.completion.token_ids for trajectory in group.trajectories]


class UntilRight(Environment):
    """Asks again until the first token is the wanted one, three times at most."""

    train_size = 10**6

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        turn = await policy.say(task.prompt)
        for _ in range(2):
            if turn.text.split()[0] == task.answer:
                break
            turn = await policy.say({"role": "user", "content": "again"})
        return Outcome(float(turn.text.split()[0] == task.answer))


# Seeds and order


@pytest.mark.parametrize("environment", [FirstToken(), UntilRight()], ids=["one turn", "conversation"])
def test_samples_depend_on_seed_version_and_prompt_not_on_who_asks(environment):
    def sampled(prompts: Sequence[Prompt], count: int = 3, version: str = "0", seed: int = 0) -> dict[str, Any]:
        found = replace(generator(Seeded(version=version), environment, encoder=Words((7,))), seed=seed)
        groups = groups_of(found, prompts, count, version)
        return {prompts[i].text: tokens(group) for i, group in groups.items()}

    wanted = sampled(PROMPTS)
    assert sampled(PROMPTS[::-1]) == wanted
    assert sampled(PROMPTS[2:3]) == {PROMPTS[2].text: wanted[PROMPTS[2].text]}
    more = sampled(PROMPTS, count=5)
    assert {text: group[:3] for text, group in more.items()} == wanted
    assert sampled(PROMPTS, version="1") != wanted and sampled(PROMPTS, seed=1) != wanted
    assert all(len(set(group)) > 1 for group in more.values()), "samples of one prompt must differ"


def test_seeds_of_tasks_with_a_number_are_those_of_earlier_versions():
    """Their prompts were known by the number of the task, which is its id today, and not by its place in a split."""
    engine = Seeded()
    task = Task("<1>", "2", id="3458")
    groups_of(generator(engine, FirstToken()), [replace(PROMPTS[1], task=task, domain=1)], 2)
    groups_of(generator(engine, FirstToken()), [replace(PROMPTS[1], task=task, domain=1, index=9)], 2)
    assert engine.asked == 2 * [([1], [seed]) for seed in response_seeds(1283552421, 2)]


def test_trajectories_stand_in_the_order_of_their_seeds():
    engine = Seeded()
    group = groups_of(generator(engine, FirstToken()), PROMPTS[:1], 16)[0]
    seeds = [seed for _, (seed,) in engine.asked]
    assert [found[0] for found in tokens(group)] == [seed % 12 for seed in seeds]
    conversations = groups_of(generator(engine, UntilRight(), encoder=Words((7,))), PROMPTS[:1], 16)[0]
    assert [found[0] for found in tokens(conversations)] == [seed % 12 for seed in seeds]


def test_conversations_go_on_until_the_environment_ends_them():
    engine = Seeded(lambda prompt, seed: (1,) if len(prompt) > 4 else (9,))
    group = groups_of(generator(engine, UntilRight(), encoder=Words((7, 8))), PROMPTS[:1], 2)[0]
    for trajectory in group.trajectories:
        completion = trajectory.completion
        assert completion.token_ids == (9, 7, 8, 9, 7, 8, 1) and trajectory.reward == 1 and trajectory.correct
        assert completion.loss_mask.tolist() == [True, False, False, True, False, False, True]
        assert trajectory.text == "9\n[user] again\n[assistant] 9\n[user] again\n[assistant] 1"
    assert (
        sorted((prompt for prompt, _ in engine.asked), key=len)
        == [[0]] * 2 + [[0, 9, 7, 8]] * 2 + [[0, 9, 7, 8, 9, 7, 8]] * 2
    )
    assert len({seed for _, seeds in engine.asked for seed in seeds}) == 6


def test_an_environment_may_begin_with_a_prompt_of_its_own():
    class Own(Environment):
        train_size = 1

        async def run(self, task: Task, policy: Conversation) -> Outcome:
            await policy.say("another prompt")
            return Outcome(1.0)

    class Numbers(Words):
        def first(self, prompt: Prompt, new: Any, tools: Any) -> tuple[int, ...]:
            return prompt.token_ids if new == prompt.task.prompt else (4, 4, 4)

    engine = Seeded()
    group = groups_of(generator(engine, Own(), encoder=Numbers()), PROMPTS[:1], 2)[0]
    assert group.prompt is PROMPTS[0] and engine.asked[0][0] == [4, 4, 4]
    assert [t.prompt for t in group.trajectories] == [replace(PROMPTS[0], token_ids=(4, 4, 4))] * 2


def test_no_prompts_is_no_request():
    engine = Seeded()
    assert groups_of(generator(engine, FirstToken()), []) == {} and engine.asked == []


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_contiguous_and_joined_they_are_the_whole(size):
    parts = [share(PROMPTS, rank, size) for rank in range(size)]
    assert [prompt for part in parts for prompt in part] == PROMPTS
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# What ends a generation


@contextmanager
def with_engines(servers: FakeServers, max_concurrent: int) -> Iterator[Generator]:
    """A generator over two fake servers, whose weights are "7"."""
    addresses = [EngineAddress("http://a:1"), EngineAddress("http://b:2")]
    with EnginePool(addresses, timeout_s=60, transport=servers, loop=LOOP) as pool:
        sampler = EngineSampler(pool, Sampling(2), max_concurrent=max_concurrent, vocabulary=32)
        yield generator(sampler, FirstToken())


def test_a_prompt_that_has_ended_does_not_wait_for_the_others():
    """With one request in flight the second is sent when the first has been answered; it is held back until the first
    prompt has been handed out."""
    handed_out = threading.Event()

    class Held(FakeServers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if len(self.calls) == 1:
                assert await asyncio.to_thread(handed_out.wait, 60)
            return await super().handle_async_request(request)

    with with_engines(Held(), 1) as found:
        groups = found.groups(PROMPTS[:3], 1, "7", never)
        assert next(groups)[0] in range(3)
        handed_out.set()
        assert len(list(groups)) == 2


def test_a_request_to_stop_cancels_what_runs():
    """What has come is handed out first."""
    asked, cancelled = threading.Event(), threading.Event()

    class Held(FakeServers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if len(self.calls) == 2:
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()
            return await super().handle_async_request(request)

    came = []
    with with_engines(Held(), 1) as found:
        for index, _ in found.groups(PROMPTS, 1, "7", asked.is_set):
            came.append(index)
            asked.set() if len(came) == 2 else None
        assert cancelled.wait(60)
    assert len(came) == 2


def test_a_request_to_stop_is_seen_while_nothing_ends():
    class Hangs(Seeded):
        async def sample(self, *arguments: Any, **options: Any) -> list[Completion]:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

    asked = threading.Event()
    threading.Timer(0.2, asked.set).start()
    assert list(generator(Hangs(), FirstToken()).groups(PROMPTS, 1, "0", asked.is_set)) == []


def test_who_stops_listening_cancels_the_rest():
    servers = FakeServers(delay_s=0.02)
    with with_engines(servers, 3) as found:
        groups = found.groups(PROMPTS, 3, "7", never)
        next(groups)
        groups.close()
        groups_of(found, PROMPTS[:1], version="7")  # the engines go on working
    assert len(servers.calls) < 3 * len(PROMPTS)


def test_the_first_failure_is_raised_and_nothing_is_sent_after_it():
    def refuse(host, body):
        return httpx.Response(500, json={"message": "out of memory"})

    servers = FakeServers({"/generate": refuse}, delay_s=0.02)
    with with_engines(servers, 3) as found, pytest.raises(EngineRefused, match="http://a:1.*out of memory"):
        groups_of(found, version="7")
    assert 1 <= len(servers.calls) < len(PROMPTS)


def test_groups_that_ended_before_a_failure_are_handed_out_first():
    async def fails_later(prompt: Sequence[int]) -> None:
        if prompt[-1] == 2:
            await asyncio.sleep(0.05)
            raise RuntimeError("the third")

    class Later(Seeded):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **options: Any) -> list[Completion]:
            await fails_later(prompt)
            return await super().sample(prompt, seeds, **options)

    came = []
    with pytest.raises(RuntimeError, match="the third"):
        for index, _ in generator(Later(), FirstToken()).groups(PROMPTS, 1, "0", never):
            came.append(index)
    assert sorted(came) == [0, 1, 3, 4, 5, 6]


def test_the_other_conversations_of_a_prompt_end_with_the_first_failure():
    requests = []

    class Fails(Seeded):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **options: Any) -> list[Completion]:
            requests.append(list(prompt))
            if len(requests) == 3:
                raise RuntimeError("the engine died")
            await asyncio.sleep(0.02)
            return await super().sample(prompt, seeds, **options)

    found = generator(Fails(lambda prompt, seed: (9,)), UntilRight(), encoder=Words((7,)))
    with pytest.raises(RuntimeError, match="the engine died"):
        groups_of(found, PROMPTS[:1], 3)
    LOOP.run(asyncio.sleep(0.1))
    assert requests == [[0]] * 3, "no second turn was asked for after the failure"


# What must not be trained on


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Seeded(version="1"), r"prompt '<0>' was sampled with weights \['1'\], but only \['0'\] may be in it"),
        (Seeded(lambda prompt, seed: ()), r"empty response to prompt '<0>' .*raise rollout.max_response_tokens"),
    ],
)
@pytest.mark.parametrize("environment", [FirstToken(), UntilRight()], ids=["one turn", "conversation"])
def test_responses_of_other_weights_and_empty_ones_stop_the_run(engine, message, environment):
    with pytest.raises(RuntimeError, match=message):
        groups_of(generator(engine, environment), PROMPTS[:1])


def test_every_turn_must_come_from_the_published_weights():
    class Stale(Seeded):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **options: Any) -> list[Completion]:
            self.version = "1" if len(prompt) == 1 else "0"
            return await super().sample(prompt, seeds, **options)

    found = generator(Stale(lambda prompt, seed: (9,)), UntilRight(), encoder=Words((7,)))
    with pytest.raises(RuntimeError, match=r"sampled with weights \['0'\], but only \['1'\] may be in it"):
        groups_of(found, PROMPTS[:1], 2, version="1")


def test_every_request_needs_its_answers():
    class OneLess(Seeded):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **options: Any) -> list[Completion]:
            return await super().sample(prompt, seeds[1:], **options)

    with pytest.raises(ValueError, match=r"the engine gave 0 answers to prompt '<0>', not 1"):
        groups_of(generator(OneLess(), FirstToken()), PROMPTS[:1])


# Rewards and failures


class Parts(SingleTurn):
    """Rewards with components; it fails on the answers 3 and above."""

    train_size = 10**6

    def score(self, task: Task, turn: Turn) -> float | Outcome:
        first = int(turn.text.split()[0])
        if first >= 3:
            raise ArithmeticError(f"no score for {first}")
        if first == 0:
            return Outcome(-1.0, {"format": 0.5}, metrics={"calls": 2.0})
        return Outcome(0.25, {"format": 1.0, "length": float(first)}, correct=first == 2)


class Talks(Environment):
    """The same, after a second turn."""

    train_size = 10**6

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        turn = await policy.say(task.prompt)
        if turn.text.startswith("7"):
            raise ArithmeticError("no score for 7")
        return Parts().score(task, await policy.say("again"))


def by_seed(*firsts: int, prompt: Prompt = PROMPTS[0]) -> Seeded:
    """An engine whose n-th sample of the prompt begins with the n-th number, in every turn."""
    engine = Seeded()
    groups_of(generator(engine, FirstToken()), [prompt], len(firsts))
    first_of = dict(zip((seed for _, seeds in engine.asked for seed in seeds), firsts))
    return Seeded(lambda prefix, seed: (first_of[seed] if len(prefix) == 1 else prefix[1], 5))


def test_components_and_further_numbers_of_a_reward_stay_with_the_trajectory():
    group = groups_of(generator(by_seed(0, 1, 2), Parts()), PROMPTS[:1])[0]
    assert [t.reward for t in group.trajectories] == [-1.0, 0.25, 0.25]
    assert [t.correct for t in group.trajectories] == [False, False, True]
    assert [dict(t.rewards) for t in group.trajectories] == [
        {"format": 0.5}, {"format": 1.0, "length": 1.0}, {"format": 1.0, "length": 2.0}
    ]  # fmt: skip
    assert [dict(t.metrics) for t in group.trajectories] == [{"calls": 2.0}, {}, {}]
    assert not any(t.failure for t in group.trajectories)


def test_a_reward_above_zero_counts_as_correct_unless_the_environment_says_otherwise():
    class Reward(SingleTurn):
        train_size = 1

        def score(self, task: Task, turn: Turn) -> float:
            return float(turn.text.split()[0]) - 1

    group = groups_of(generator(by_seed(0, 1, 2), Reward()), PROMPTS[:1])[0]
    assert [(t.reward, t.correct) for t in group.trajectories] == [(-1.0, False), (0.0, False), (1.0, True)]


@pytest.mark.parametrize("environment", [Parts(), Talks()], ids=["one turn", "conversation"])
def test_a_failure_stops_the_run_and_names_the_task(environment):
    prompt = replace(PROMPTS[0], task=Task("<0>", "1", id="toy/train/0"))
    found = generator(by_seed(0, 3, 1, prompt=prompt), environment, encoder=Words((7,)))
    message = r"environment 'toy' failed on task toy/train/0 \(exception: no score for 3\).*\"zero\" or \"drop\""
    with pytest.raises(EnvironmentFailed, match=message):
        groups_of(found, [prompt])


@pytest.mark.parametrize("environment", [Parts(), Talks()], ids=["one turn", "conversation"])
def test_a_failure_earns_nothing_and_keeps_its_tokens(environment):
    found = generator(by_seed(2, 3, 1), environment, encoder=Words((7,)), on_failure="zero")
    group = groups_of(found, PROMPTS[:1])[0]
    assert [t.reward for t in group.trajectories] == [0.25, 0.0, 0.25]
    assert [t.correct for t in group.trajectories] == [True, False, False]
    assert [t.failure for t in group.trajectories] == [None, "exception: no score for 3", None]
    failed = group.trajectories[1]
    assert failed.completion.token_ids == ((3, 5) if isinstance(environment, Parts) else (3, 5, 7, 3, 5))
    assert failed.rewards == failed.metrics == {}
    assert environment_counts(found) == {"failures": 1}


def test_a_failure_after_the_first_turn_keeps_that_turn():
    found = generator(by_seed(2, 7), Talks(), encoder=Words((7,)), on_failure="zero")
    group = groups_of(found, PROMPTS[:1], 2)[0]
    assert tokens(group)[1] == (7, 5) and group.trajectories[1].completion.loss_mask is None


@pytest.mark.parametrize("environment", [Parts(), Talks()], ids=["one turn", "conversation"])
def test_a_failure_is_left_out_of_its_group(environment):
    found = generator(by_seed(2, 3, 1, 4), environment, encoder=Words((7,)), on_failure="drop")
    group = groups_of(found, PROMPTS[:1], 4)[0]
    assert [found[0] for found in tokens(group)] == [2, 1] and group.prompt is PROMPTS[0]
    assert environment_counts(found) == {"failures": 2}
    found = generator(by_seed(3, 4), environment, encoder=Words((7,)), on_failure="drop")
    assert groups_of(found, PROMPTS[:1], 2)[0] == RolloutGroup(PROMPTS[0], ())


def environment_counts(found: Generator) -> dict[str, int]:
    return dict(found.environments[0].pool.take_counts())


@pytest.mark.parametrize("on_failure", ["zero", "drop"])
def test_a_failure_before_the_policy_said_anything_has_no_trajectory(on_failure):
    class Silent(Environment):
        train_size = 1

        async def run(self, task: Task, policy: Conversation) -> Outcome:
            if task.answer == "1":
                raise ArithmeticError("nothing to say")
            return Outcome(1.0)

    for prompt in PROMPTS[:2]:  # the second returns an outcome without a turn, which is a failure too
        found = generator(Seeded(), Silent(), on_failure=on_failure)
        assert groups_of(found, [prompt], 2)[0].trajectories == ()
    with pytest.raises(EnvironmentFailed, match=r"invalid: run\(\) returned an outcome before it let the policy say"):
        groups_of(generator(Seeded(), Silent()), PROMPTS[1:2], 2)


class Ranked(Parts):
    """The group decides: the highest first token wins."""

    def __init__(self) -> None:
        self.seen: list[tuple[EnvironmentTrajectory, ...]] = []

    def score_group(self, task: Task, trajectories: Sequence[EnvironmentTrajectory]) -> Sequence[Outcome]:
        self.seen.append(tuple(trajectories))
        firsts = [int(t.turns[-1].text.split()[0]) for t in trajectories]
        return [Outcome(float(first == max(firsts)), {"first": float(first)}) for first in firsts]


def test_a_group_is_scored_together_without_those_that_failed():
    environment = Ranked()
    found = generator(by_seed(2, 3, 1), environment, on_failure="zero")
    group = groups_of(found, PROMPTS[:1])[0]
    assert [t.reward for t in group.trajectories] == [1.0, 0.0, 0.0]
    assert [dict(t.rewards) for t in group.trajectories] == [{"first": 2.0}, {}, {"first": 1.0}]
    assert [t.failure is None for t in group.trajectories] == [True, False, True]
    ((first, second),) = environment.seen
    assert first.outcome == Outcome(0.25, {"format": 1.0, "length": 2.0}, correct=True)
    assert first.turns == (Turn("2 5", "stop", (2, 5)),) and second.turns == (Turn("1 5", "stop", (1, 5)),)


def test_a_group_of_failures_alone_is_not_scored():
    environment = Ranked()
    group = groups_of(generator(by_seed(3, 4), environment, on_failure="zero"), PROMPTS[:1], 2)[0]
    assert environment.seen == [] and [t.reward for t in group.trajectories] == [0.0, 0.0]


def test_the_turns_of_conversations_are_scored_together():
    class TalksRanked(Talks):
        def __init__(self) -> None:
            self.ranked = Ranked()

        def score_group(self, task: Task, trajectories: Sequence[EnvironmentTrajectory]) -> Sequence[Outcome]:
            return self.ranked.score_group(task, trajectories)

    environment = TalksRanked()
    group = groups_of(generator(by_seed(1, 2), environment, encoder=Words((7,))), PROMPTS[:1], 2)[0]
    assert [t.reward for t in group.trajectories] == [0.0, 1.0]
    assert [len(t.turns) for t in environment.ranked.seen[0]] == [2, 2]


def test_an_environment_that_scores_groups_alone_needs_no_score():
    environment = Ranked()
    one = running(environment)
    one = replace(one, description=replace(one.description, scores=False))
    found = Generator(by_seed(3, 4), [one], Words(), LOOP, seed=0)
    assert [t.reward for t in groups_of(found, PROMPTS[:1], 2)[0].trajectories] == [0.0, 1.0]
    assert [t.outcome for t in environment.seen[0]] == [Outcome(0.0)] * 2


def test_a_failure_of_the_group_is_a_failure_of_each():
    class NoRanking(InProcess):
        async def score_group(self, *arguments: Any, **options: Any) -> Failure:
            return Failure("exception", "no ranking")

    one = replace(running(Ranked(), on_failure="zero"), pool=NoRanking(Ranked()))
    group = groups_of(Generator(by_seed(1, 2), [one], Words(), LOOP, seed=0), PROMPTS[:1], 2)[0]
    assert [(t.reward, t.failure) for t in group.trajectories] == [(0.0, "exception: no ranking")] * 2


def test_all_calls_of_a_step_share_a_budget_and_are_numbered():
    """It is that of the domain: prompts x samples calls, and one for each group."""
    asked: list[tuple[str, int | None, StepBudget | None]] = []

    class Counting(InProcess):
        async def score(self, task: Task, turn: Turn, **options: Any) -> Outcome | Failure:
            asked.append(("score", options["sample"], options["budget"]))
            return Failure("deadline", "cut") if options["sample"] == 1 else await super().score(task, turn, seed=0)

        async def score_group(self, *arguments: Any, **options: Any) -> list[Outcome]:
            asked.append(("group", None, options["budget"]))
            return [Outcome(1.0)]

    ranked = replace(running(Ranked(), on_failure="zero", step_budget_s=80, workers=1), pool=Counting(FirstToken()))
    prompts = [replace(prompt, domain=index % 2) for index, prompt in enumerate(PROMPTS[:5])]
    found = Generator(Seeded(), [ranked, ranked], Words(), LOOP, seed=0)
    groups = groups_of(found, prompts, 2)
    assert [[t.failure for t in group.trajectories] for group in groups.values()] == [[None, "deadline: cut"]] * 5
    assert sorted(sample for call, sample, _ in asked if sample is not None) == [0] * 5 + [1] * 5
    budgets = {id(budget): budget for _, _, budget in asked}.values()
    assert len(budgets) == 2
    for budget in budgets:
        assert budget is not None and budget.seconds == 80
        budget.spend(40)
    # 3 prompts of one domain and 2 of the other, each with two samples and a group
    assert sorted(budget.part_s for budget in budgets if budget) == [40 / 9, 40 / 6]
    asked.clear()
    groups_of(found, prompts[:1], 2)
    assert not {id(budget) for _, _, budget in asked} & set(map(id, budgets)), "the next step begins anew"


def test_environments_get_seeds_of_their_own_by_prompt_and_sample():
    seeds: list[tuple[int, int]] = []

    class Dice(Environment):
        train_size = 10

        async def run(self, task: Task, policy: Conversation) -> Outcome:
            seeds.append((int(task.answer), policy.seed))
            await policy.say(task.prompt)
            return Outcome(1.0)

    groups_of(generator(Seeded(), Dice()), PROMPTS[:3], 2)
    once = list(seeds)
    seeds.clear()
    groups_of(generator(Seeded(version="1"), Dice()), PROMPTS[2::-1], 2, version="1")
    assert sorted(seeds) == sorted(once), "they depend neither on the weights nor on the order"
    assert len({seed for _, seed in once}) == 6 and all(0 <= seed < 2**31 for _, seed in once)


# The control experiment


def test_the_random_control_is_a_fair_repeatable_coin_that_keeps_the_truth():
    prompts = [one_prompt(index) for index in range(100)]

    def flipped(seed: int, environment: SingleTurn) -> list[list[Any]]:
        found = replace(generator(Seeded(), environment), seed=seed, random_reward=True)
        return [list(group.trajectories) for _, group in sorted(groups_of(found, prompts, 16).items())]

    class Wrong(FirstToken):
        def score(self, task: Task, turn: Turn) -> Outcome:
            return Outcome(0.0, {"format": 1.0}, correct=False)

    groups = flipped(5, FirstToken())
    coins = [t.reward for group in groups for t in group]
    assert set(coins) == {0.0, 1.0}
    assert 0.45 < sum(coins) / len(coins) < 0.55  # 1600 fair coins: standard deviation 0.0125
    wrong = flipped(5, Wrong())
    assert coins == [t.reward for group in wrong for t in group]
    assert coins != [t.reward for group in flipped(6, FirstToken()) for t in group]
    assert not any(t.correct for group in wrong for t in group) and wrong[0][0].rewards == {"format": 1.0}
    truth = [t.completion.token_ids[0] == (t.prompt.token_ids[0] + 1) % 12 for group in groups for t in group]
    assert truth == [t.correct for group in groups for t in group] and any(truth) and not all(truth)
    assert len({tuple(t.reward for t in group) for group in groups}) > 95, "coins differ between prompts"


def test_the_coins_of_earlier_versions_fall_the_same_way():
    prompt = replace(PROMPTS[0], domain=1, task=Task("<0>", "1", id="3458"))
    found = replace(generator(Seeded(), FirstToken()), seed=5, random_reward=True)
    assert [t.reward for t in groups_of(found, [prompt], 16)[0].trajectories] == [
        0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0
    ]  # fmt: skip
