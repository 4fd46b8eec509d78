"""Balance, the limit on concurrency, seeds and limits of the sampler, against fake servers."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.errors import EngineRefused
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.rollout.conversation import response_seeds
from fiberpo_megatron.rollout.sampler import SLACK, SPILL, EngineSampler
from fiberpo_megatron.rollout.slots import Slots
from tests.engines.fake_server import FakeServers, response
from tests.rollout.in_order import in_order

ENGINES = [EngineAddress("http://a:1"), EngineAddress("http://b:2")]
PROMPTS = [[10 + i, 2, 3] for i in range(7)]


@contextmanager
def sampler(
    servers: FakeServers,
    max_concurrent: int,
    sampling: Sampling | None = None,
) -> Iterator[EngineSampler]:
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool:
        yield EngineSampler(pool, sampling or Sampling(2), max_concurrent=max_concurrent, vocabulary=32)


@pytest.mark.parametrize("max_concurrent", [1, 4, 21, 1000])
def test_responses_belong_to_their_prompts_whatever_is_in_flight(max_concurrent):
    servers = FakeServers(delay_s=0.005)
    with sampler(servers, max_concurrent) as engines:
        groups = in_order(engines, PROMPTS, 3)
    assert [[c.token_ids[0] for c in group] for group in groups] == [[p[0]] * 3 for p in PROMPTS]
    assert servers.most_running <= max(max_concurrent, 3)  # one request at least, however many responses it wants
    assert {host for host, _, _ in servers.calls} == {"a:1", "b:2"} if max_concurrent >= 6 else {"a:1"}


def test_each_prompt_goes_to_the_engine_with_the_fewest_responses_in_flight():
    servers = FakeServers(delay_s=0.01)
    with sampler(servers, 6) as engines:
        in_order(engines, PROMPTS, 3)
    sizes = [len(body["input_ids"]) for _, _, body in servers.calls]
    assert sizes == [3] * 7 and servers.most_running == 6
    hosts = [host for host, _, _ in servers.calls]
    assert abs(hosts.count("a:1") - hosts.count("b:2")) <= 1


def test_responses_to_one_prompt_share_an_engine_unless_it_has_far_more_to_do():
    servers = FakeServers(delay_s=0.05)

    async def ask(engines: EngineSampler) -> None:
        alternating = [prompt for _ in range(4) for prompt in ([1], [2], [3])]
        await asyncio.gather(*(engines.sample(prompt, [i]) for i, prompt in enumerate(alternating)))
        await asyncio.gather(*(engines.sample([4], [i]) for i in range(60)))
        await engines.sample([2], [0])  # where the work on the prompt may still be in the cache

    with sampler(servers, 1000) as engines:
        engines.engines.run(ask(engines))
    hosts = [(body["input_ids"][0][0], host) for host, _, body in servers.calls]
    assert hosts[:3] == [(1, "a:1"), (2, "b:2"), (3, "a:1")] and len(set(hosts[:12])) == 3
    late = Counter(host for prompt, host in hosts if prompt == 4)
    most = max(late.values())
    assert len(late) == 2 and most <= SPILL * 30 + SLACK + 1
    first = [host for prompt, host in hosts if prompt == 4]
    alone = int(SLACK / (1 - SPILL / 2)) + 1  # until one engine has more than SPILL times the mean and SLACK
    assert first[:alone] == [first[0]] * alone and first[alone] != first[0]
    assert hosts[-1] == (2, "b:2")


def test_the_turns_of_a_conversation_stay_on_one_engine():
    """`priority` names the group: the prompt of a turn is longer than that of the turn before."""
    servers = FakeServers()

    async def ask(engines: EngineSampler) -> None:
        for turn in range(3):
            for group in (1, 2, 3):
                await engines.sample([group, *range(turn)], [0], priority=group)

    with sampler(servers, 1000) as engines:
        engines.engines.run(ask(engines))
    hosts = {group: {h for h, _, body in servers.calls if body["input_ids"][0][0] == group} for group in (1, 2, 3)}
    assert all(len(found) == 1 for found in hosts.values())


def test_responses_are_counted_not_requests():
    """While one engine works on four responses, two requests of two fit on the other."""
    servers = FakeServers(delay_s=0.05)

    async def ask(engines: EngineSampler) -> None:
        counts = (4, 2, 1, 1, 4)
        await asyncio.gather(*(engines.sample([i + 1], list(range(count))) for i, count in enumerate(counts)))

    with sampler(servers, 100) as engines:
        engines.engines.run(ask(engines))
    assert [(host, len(body["input_ids"])) for host, _, body in servers.calls] == [
        ("a:1", 4), ("b:2", 2), ("b:2", 1), ("b:2", 1), ("a:1", 4)
    ]  # fmt: skip


def test_every_token_says_which_engine_sampled_it():
    with sampler(FakeServers(delay_s=0.01), 100) as engines:
        groups = in_order(engines, PROMPTS[:3], 2)
    assert [[c.engines.tolist() for c in group] for group in groups] == [[[e, e]] * 2 for e in (0, 1, 0)]
    assert groups[0][0].engines.dtype == np.int16


def test_seeds_are_one_per_response_and_depend_on_the_prompts_seed_alone():
    servers = FakeServers()
    with sampler(servers, 100) as engines:
        in_order(engines, PROMPTS[:2], 3, seeds=[5, 6])
        in_order(engines, PROMPTS[1:2], 3, seeds=[6])
    calls = sorted(
        (body["input_ids"][0][0], i, body["sampling_params"]) for i, (_, _, body) in enumerate(servers.calls)
    )
    seeds = [p["sampling_seed"] for _, _, parameters in calls for p in parameters]
    assert seeds == response_seeds(5, 3) + response_seeds(6, 3) + response_seeds(6, 3)
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert response_seeds(5, 2) == response_seeds(5, 3)[:2]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "a prompt has no tokens"), ([3, 32], "a prompt has token 32, .* 0 .. 31"), ([-1], "has token -1")],
)
def test_a_prompt_that_would_kill_the_engine_is_not_sent(prompt, message):
    servers = FakeServers()
    with sampler(servers, 4) as engines:
        with pytest.raises(ValueError, match=message):
            in_order(engines, [prompt], 1)
        with pytest.raises(ValueError, match=message.replace("a prompt", "the text to score")):
            engines.score(prompt)
    assert servers.calls == []


def test_limits_of_one_request_narrow_those_of_the_run():
    servers = FakeServers()
    sampling = Sampling(5, stop_token_ids=(1,), temperature=0.5)
    with sampler(servers, 4, sampling) as engines:
        for limit in (None, 3, 9):
            engines.engines.run(engines.sample([4], [0], max_tokens=limit, stop_token_ids=(7, 8)))
        engines.engines.run(engines.sample([4], [0]))
    sent = [body["sampling_params"][0] for _, _, body in servers.calls]
    assert [parameters["max_new_tokens"] for parameters in sent] == [5, 3, 5, 5]
    assert [parameters["stop_token_ids"] for parameters in sent] == [[1, 7, 8]] * 3 + [[1]]
    assert all(parameters["temperature"] == 0.5 for parameters in sent)


def test_scores_come_from_every_engine():
    def score(host, body):
        entries = [[None, 5, None], [-1.0 if host == "a:1" else -2.0, 6, None]]
        return response([], body["input_ids"], input_token_logprobs=entries)

    with sampler(FakeServers({"/generate": score}), 4) as engines:
        assert {number: scores.tolist() for number, scores in engines.score([5, 6]).items()} == {0: [-1.0], 1: [-2.0]}


def test_a_failure_frees_its_slots_and_is_in_flight_no_more():
    failing = [True]

    def refuse_first(host, body):
        if failing.pop() if failing else False:
            return httpx.Response(500, json={"message": "out of memory"})
        return [response([prompt[0]], prompt) for prompt in body["input_ids"]]

    servers = FakeServers({"/generate": refuse_first})
    with sampler(servers, 3) as engines:
        with pytest.raises(EngineRefused, match="http://a:1.*out of memory"):
            in_order(engines, PROMPTS[:1], 3)
        in_order(engines, PROMPTS[:1], 3)
    assert [host for host, _, _ in servers.calls] == ["a:1", "a:1"]  # engine a is as idle as b again


def test_slots_are_given_in_the_order_of_asking():
    """A request that wants many is not overtaken by small ones for ever, and one that wants all comes alone."""
    log: list[str] = []

    async def scenario() -> None:
        slots = Slots(4)

        async def hold(name: str, count: int) -> None:
            async with slots.taken(count):
                log.append(name)
                await asyncio.sleep(0.01)
                log.append(f"{name} ends")

        await asyncio.gather(*(hold(name, count) for name, count in (("a", 2), ("b", 9), ("c", 1), ("d", 4))))

    asyncio.run(scenario())
    assert log == ["a", "a ends", "b", "b ends", "c", "c ends", "d", "d ends"]


@pytest.mark.parametrize("given", [False, True], ids=["while it waits", "just as its turn comes"])
def test_who_is_cancelled_gives_its_slots_back(given):
    async def scenario() -> None:
        slots = Slots(1)
        held = asyncio.Event()

        async def hold() -> None:
            async with slots.taken(1):
                await held.wait()

        first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(0)
        if given:
            held.set()
            await asyncio.sleep(0)  # the first has ended and given its slot to the second, which has not run yet
            assert not second.done() and not slots._waiting
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        held.set()
        await first
        async with asyncio.timeout(5), slots.taken(1):
            pass

    asyncio.run(scenario())
