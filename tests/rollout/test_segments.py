"""Responses that are sampled in several segments: cut, aborted, or asked for at another engine."""

import asyncio
import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.errors import EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.rollout.segments import RoutesMissing, join_segments
from fiberpo_megatron.types import Completion, WeightSpan
from tests.engines.fake_server import FakeServers, response
from tests.tiny_model import LAYERS, TOP_K

ENGINES = [EngineAddress("http://a:1"), EngineAddress("http://b:2")]
END = 31
PROMPT = [1, 2, 3]


def token_at(seed: int, position: int) -> int:
    """A draw of a server that hashes seed and position; about every thirtieth ends a response."""
    return int(np.random.default_rng([seed, position]).integers(0, 30)) + 2  # END is the last of them


class Drawing(FakeServers):
    """Draws as SGLang's seeded sampler does; `cut` says after how many tokens a request is aborted."""

    def __init__(self, cut: Callable[[int], int] | None = None, delay_s: float = 0.0) -> None:
        super().__init__({"/generate": self.draw}, delay_s)
        self.cut = cut
        self.weights = "7"

    def draw(self, host: str, body: Any) -> list[dict[str, Any]]:
        return [self.one(*pair) for pair in zip(body["input_ids"], body["sampling_params"], strict=True)]

    def one(self, prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
        tokens: list[int] = []
        reason: dict[str, Any] = {"type": "length"}
        limit = parameters["max_new_tokens"]
        cut = limit if self.cut is None else min(limit, self.cut(len(prompt)))
        while len(tokens) < cut:
            tokens.append(token_at(parameters["sampling_seed"], len(prompt) + len(tokens)))
            if tokens[-1] == END:
                reason = {"type": "stop", "matched": END}
                break
        if len(tokens) == cut < limit and reason["type"] == "length":
            reason = {"type": "abort", "message": "Aborted"}
        changes: dict[str, Any] = {
            "finish_reason": reason,
            "weight_versions": [{"version": self.weights, "start": 0, "end": len(tokens)}],
        }
        if not tokens:  # what SGLang says of a request that it aborts in its queue
            changes |= {"prompt_tokens": None}
        return response(tokens, prompt, **changes)


@contextmanager
def sampling(servers: FakeServers, limit: int = 40, segment_tokens: int | None = None) -> Iterator[EngineSampler]:
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool:
        yield EngineSampler(pool, Sampling(limit), max_concurrent=64, vocabulary=32, segment_tokens=segment_tokens)


def ask(engines: EngineSampler, seeds: list[int]) -> list[Completion]:
    async def together() -> list[Completion]:
        found = await asyncio.gather(*(engines.sample(PROMPT, [seed]) for seed in seeds))
        return [one for (one,) in found]

    return engines.engines.run(together())


def assert_equal(ours: list[Completion], theirs: list[Completion]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.finish_reason, a.weight_spans) == (b.token_ids, b.finish_reason, b.weight_spans)


SEEDS = list(range(12))


def test_a_response_is_the_same_wherever_it_is_cut():
    with sampling(Drawing()) as engines:
        whole = ask(engines, SEEDS)
        assert {one.finish_reason for one in whole} == {"stop", "length"}
        assert len(ask(engines, SEEDS)) == len(engines.engines.addresses) * 6
    for size in (1, 2, 3, 7, 39, 40, 41):
        servers = Drawing()
        with sampling(servers, segment_tokens=size) as engines:
            assert_equal(ask(engines, SEEDS), whole)
        assert all(p["max_new_tokens"] <= size for _, _, body in servers.calls for p in body["sampling_params"])
        longest = max(len(one.token_ids) for one in whole)
        assert len(servers.calls) >= -(-longest // size)


def test_what_is_aborted_while_engines_are_held_goes_on_behind_its_tokens():
    """Some were aborted in the queue and have none; their next request may come under newer weights."""
    with sampling(Drawing()) as engines:
        whole = ask(engines, SEEDS)
    servers = Drawing(delay_s=0.05)
    with sampling(servers) as engines:
        work = engines.engines.submit(asyncio.wait_for(_many(engines), 30))
        while not servers.calls:
            pass
        engines.hold()
        servers.cut = lambda length: length % 4 * 3  # the engines abort all, at some token
        engines.cut_short(10)
        assert "/abort_request" in servers.paths()
        sent = servers.paths().count("/generate")
        servers.cut, servers.weights = None, "8"
        assert not work.done()
        engines.release()
        found = work.result(30)
        continued = engines.take_counts()["continued"]
        assert servers.paths().count("/generate") - sent == continued > len(SEEDS) / 2
    for a, b in zip(found, whole, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert [span.version for span in a.weight_spans] in (["7"], ["7", "8"], ["8"])
        assert a.weight_spans[-1].end == len(a.token_ids)


async def _many(engines: EngineSampler) -> list[Completion]:
    found = await asyncio.gather(*(engines.sample(PROMPT, [seed]) for seed in SEEDS))
    return [one for (one,) in found]


def test_an_engine_that_never_lets_go_is_named():
    servers = Drawing(delay_s=1.0)
    with sampling(servers) as engines:
        work = engines.engines.submit(_many(engines))
        while not servers.calls:
            pass
        engines.hold()
        with pytest.raises(TimeoutError, match=r"http://a:1 \(\d+\).*rollout.partial = 'drain'"):
            engines.cut_short(0.1)
        engines.release()
        work.result(30)


class OneIsDead(Drawing):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "a":
            self.calls.append(("a:1", request.url.path, None))
            raise httpx.ConnectError("refused")
        return await super().handle_async_request(request)


def test_a_request_that_fails_is_asked_again_elsewhere_and_the_dead_engine_is_avoided():
    with sampling(Drawing()) as engines:
        whole = ask(engines, SEEDS)
    servers = OneIsDead()
    with sampling(servers, segment_tokens=4) as engines:
        for seed, expected in zip(SEEDS, whole, strict=True):
            (found,) = ask(engines, [seed])
            assert found.token_ids == expected.token_ids and set(found.engines.tolist()) == {1}
        assert engines.take_counts()["retried"] == 1
    assert [host for host, _, _ in servers.calls].count("a:1") == 1


def test_a_request_that_fails_everywhere_names_all_engines():
    class AllDead(Drawing):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

    with sampling(AllDead()) as engines, pytest.raises(EngineUnreachable, match="http://b:2") as raised:
        ask(engines, [1])
    assert "http://a:1" in raised.value.__notes__[0]


def test_requests_of_lower_priority_numbers_go_first():
    servers = FakeServers(delay_s=0.01)
    with EnginePool(ENGINES[:1], timeout_s=5, transport=servers) as pool:
        engines = EngineSampler(pool, Sampling(2), max_concurrent=1, vocabulary=64)

        async def all_at_once() -> None:
            order = (5, 3, 4, -1, 3)
            await asyncio.gather(*(engines.sample([20 + p], [0], priority=p) for p in order))

        pool.run(all_at_once())
    assert [body["input_ids"][0][0] - 20 for _, _, body in servers.calls] == [5, -1, 3, 3, 4]


def test_each_segment_keeps_its_own_experts_versions_and_engines():
    def segment(tokens: int, rows: int, version: str, engine: int, value: int) -> Completion:
        experts = np.full((rows, 1, 2), value, np.uint8)
        spans = (WeightSpan(version, 0, tokens),)
        engines = np.full(tokens, engine, np.int16)
        return Completion((7,) * tokens, np.full(tokens, -1.0, np.float32), "abort", spans, experts, engines=engines)

    none = Completion((), np.zeros(0, np.float32), "abort", (), engines=np.zeros(0, np.int16))
    first = segment(2, 4, "1", 0, 10)  # a prompt of 3 tokens, and the first token of its own
    joined = join_segments([first, none, segment(3, 3, "1", 1, 11), segment(1, 1, "2", 1, 12)])
    assert joined.weight_spans == (WeightSpan("1", 0, 5), WeightSpan("2", 5, 6))
    assert joined.engines is not None and joined.engines.tolist() == [0, 0, 1, 1, 1, 1]
    assert joined.routed_experts is not None
    assert joined.routed_experts[:, 0, 0].tolist() == [10] * 4 + [11] * 3 + [12]
    with pytest.raises(RoutesMissing, match="answer 1 of 2 .* of 2 positions, not of the 3 .* position 6 has none or"):
        join_segments([first, segment(3, 2, "1", 1, 11)])


class Routing(Drawing):
    """Names the expert p mod 4 for position p, of those positions that it is asked for."""

    def draw(self, host: str, body: Any) -> list[dict[str, Any]]:
        answers = super().draw(host, body)
        for prompt, answer in zip(body["input_ids"], answers, strict=True):
            positions = np.arange(body["routed_experts_start_len"], len(prompt) + len(answer["output_ids"]) - 1)
            experts = np.repeat(positions % 4, 2).astype("<i4")
            answer["meta_info"]["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
        return answers


@pytest.mark.parametrize("size", [1, 3, None])
@pytest.mark.parametrize("known", [0, 2])
def test_an_engine_is_asked_for_the_experts_of_what_is_new(known: int, size: int | None):
    """A conversation has those of the first positions already; each request names each further position once."""
    servers, shape = Routing(), RoutingShape(layers=1, top_k=2, experts=4)
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool:
        engines = EngineSampler(pool, Sampling(8), max_concurrent=4, vocabulary=32, routing=shape, segment_tokens=size)
        (found,) = pool.run(engines.sample(PROMPT, [1], known_routes=known))
    asked = [(body["routed_experts_start_len"], len(body["input_ids"][0])) for _, _, body in servers.calls]
    assert asked[0] == (known, len(PROMPT)) and all(start == length - 1 for start, length in asked[1:])
    assert len(asked) == -(-len(found.token_ids) // (size or 8))
    positions = np.arange(known, len(PROMPT) + len(found.token_ids) - 1)
    assert found.routed_experts is not None and found.routed_experts[:, 0, 0].tolist() == (positions % 4).tolist()


def test_experts_of_a_response_that_was_aborted_stand_at_their_tokens():
    """A request that was aborted in its queue has read nothing: the next one names the prompt's experts."""
    servers, shape = Routing(delay_s=0.05), RoutingShape(layers=1, top_k=2, experts=4)
    with EnginePool(ENGINES, timeout_s=5, transport=servers) as pool:
        engines = EngineSampler(pool, Sampling(40), max_concurrent=64, vocabulary=32, routing=shape)
        work = pool.submit(asyncio.wait_for(_many(engines), 30))
        while not servers.calls:
            pass
        engines.hold()
        servers.cut = lambda length: len(servers.calls) % 3  # none, one or two tokens
        engines.cut_short(10)
        servers.cut = None
        engines.release()
        found = work.result(30)
    for one in found:
        positions = np.arange(len(PROMPT) + len(one.token_ids) - 1)
        assert one.routed_experts is not None and one.routed_experts[:, 0, 0].tolist() == (positions % 4).tolist()


@pytest.mark.sglang
def test_a_real_engine_goes_on_with_the_same_draws(engine: EngineAddress):
    """Cut at every token, and aborted in the middle: the same tokens and experts, and log-probs to rounding."""
    limit, shape = 24, RoutingShape(LAYERS, TOP_K, experts=4)
    with EnginePool([engine], timeout_s=60) as pool:

        def sampler(size: int | None, tokens: int = limit) -> EngineSampler:
            return EngineSampler(
                pool, Sampling(tokens), max_concurrent=64, vocabulary=64, routing=shape, segment_tokens=size
            )

        whole = ask(sampler(None), SEEDS[:3])
        for size in (1, 2, 5, limit - 1):
            for ours, theirs in zip(ask(sampler(size), SEEDS[:3]), whole, strict=True):
                assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
                np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
                assert ours.routed_experts is not None and theirs.routed_experts is not None
                assert ours.routed_experts.shape == theirs.routed_experts.shape
                same = (np.sort(ours.routed_experts, -1) == np.sort(theirs.routed_experts, -1)).all(-1)
                assert same.mean() > 0.99  # an exact tie of two router scores may fall either way
        (one, *_) = ask(sampler(None), SEEDS[:1])  # a conversation's next turn: it is asked for what is new
        assert one.routed_experts is not None
        turn = [*PROMPT, *one.token_ids, 9, 10]
        known = len(PROMPT) + len(one.token_ids) - 1
        (new,), (all_of_it,) = (pool.run(sampler(None).sample(turn, [3], known_routes=first)) for first in (known, 0))
        assert new.token_ids == all_of_it.token_ids
        assert new.routed_experts is not None and all_of_it.routed_experts is not None
        assert len(new.routed_experts) == 3 + len(new.token_ids) - 1
        np.testing.assert_array_equal(new.routed_experts, all_of_it.routed_experts[known:])
        np.testing.assert_array_equal(one.routed_experts, all_of_it.routed_experts[:known])
        long = sampler(None, 400)
        undisturbed = pool.run(_many(long))
        work = pool.submit(_many(long))
        while not long._in_flight.total():
            pass
        pool.run(asyncio.sleep(0.3))
        long.hold()
        long.cut_short(30)
        assert not work.done()
        long.release()
        for ours, theirs in zip(work.result(60), undisturbed, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.routed_experts is not None and len(ours.routed_experts) == len(PROMPT) + len(ours.token_ids) - 1
        assert long.take_counts()["continued"] > 0
