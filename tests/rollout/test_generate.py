"""Order, balance, the limit on concurrency and the first error, against fake servers."""

import asyncio
import threading

import httpx
import pytest

from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.errors import EngineRefused, SamplingStopped
from fiberpo_megatron.rollout.generate import EngineSampler, response_seeds
from tests.engines.fake_server import FakeServers
from tests.rollout.in_order import in_order

ENGINES = [EngineAddress("http://a:1"), EngineAddress("http://b:2")]
PROMPTS = [[10 + i, 2, 3] for i in range(7)]


def sampler(servers: FakeServers, max_concurrent: int) -> EngineSampler:
    return EngineSampler(
        ENGINES,
        Sampling(2),
        max_concurrent=max_concurrent,
        timeout_s=5,
        vocabulary=32,
        transport=servers,
    )


@pytest.mark.parametrize("max_concurrent", [1, 4, 21, 1000])
def test_responses_come_in_order_whatever_the_requests(max_concurrent):
    servers = FakeServers(delay_s=0.005)
    with sampler(servers, max_concurrent) as engines:
        groups = in_order(engines, PROMPTS, 3)
    assert [[c.token_ids[0] for c in group] for group in groups] == [[p[0]] * 3 for p in PROMPTS]
    assert servers.most_running <= max(max_concurrent, 2 * 3)
    assert {host for host, _, _ in servers.calls} == {"a:1", "b:2"}


def test_a_prompt_that_has_ended_does_not_wait_for_the_others():
    """With one request in flight the second is sent when the first has been answered; it is held back until the first
    prompt has been handed out."""
    handed_out = threading.Event()

    class Held(FakeServers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if len(self.calls) == 1:
                assert await asyncio.to_thread(handed_out.wait, 60)
            return await super().handle_async_request(request)

    with sampler(Held(), 1) as engines:
        answers = engines.sample(PROMPTS[:3], 1)
        assert next(answers)[0] in range(3)
        handed_out.set()
        assert len(list(answers)) == 2


def test_a_request_to_stop_cancels_what_runs():
    """What has come is handed out first."""
    asked = threading.Event()

    class Held(FakeServers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if len(self.calls) == 2:
                await asyncio.Event().wait()
            return await super().handle_async_request(request)

    came = []
    with sampler(Held(), 1) as engines, pytest.raises(SamplingStopped):
        for index, _ in engines.sample(PROMPTS, 1, stop=asked.is_set):
            came.append(index)
            asked.set() if len(came) == 2 else None
    assert len(came) == 2


def test_who_stops_listening_cancels_the_rest():
    servers = FakeServers(delay_s=0.02)
    with sampler(servers, 3) as engines:
        answers = engines.sample(PROMPTS, 3)
        next(answers)
        answers.close()
        in_order(engines, PROMPTS[:1], 3)  # the sampler goes on working
    assert len(servers.calls) < len(PROMPTS)


def test_no_prompts_is_no_request():
    servers = FakeServers()
    with sampler(servers, 4) as engines:
        assert in_order(engines, [], 3) == []
    assert servers.calls == []


def test_each_prompt_goes_to_the_less_busy_engine():
    servers = FakeServers(delay_s=0.01)
    with sampler(servers, 6) as engines:
        in_order(engines, PROMPTS, 3)
    sizes = [len(body["input_ids"]) for _, _, body in servers.calls]
    assert sizes == [3] * 7 and servers.most_running == 6
    hosts = [host for host, _, _ in servers.calls]
    assert abs(hosts.count("a:1") - hosts.count("b:2")) <= 1


def test_the_first_failure_is_raised_and_nothing_is_sent_after_it():
    def refuse(host, body):
        return httpx.Response(500, json={"message": "out of memory"})

    servers = FakeServers({"/generate": refuse}, delay_s=0.02)
    with sampler(servers, 3) as engines, pytest.raises(EngineRefused, match="http://a:1.*out of memory"):
        in_order(engines, PROMPTS, 3)
    assert 1 <= len(servers.calls) < len(PROMPTS)


def test_seeds_are_one_per_response_and_depend_on_the_prompts_seed_alone():
    servers = FakeServers()
    with sampler(servers, 100) as engines:
        in_order(engines, PROMPTS[:2], 3, seeds=[5, 6])
        in_order(engines, PROMPTS[1:2], 3, seeds=[6])
    seeds = [p["sampling_seed"] for _, _, body in servers.calls for p in body["sampling_params"]]
    assert seeds == response_seeds(5, 3) + response_seeds(6, 3) + response_seeds(6, 3)
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert response_seeds(5, 2) == response_seeds(5, 3)[:2]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 1 has no tokens"), ([3, 32], "prompt 1 has token 32, .* 0 .. 31"), ([-1], "has token -1")],
)
def test_a_prompt_that_would_kill_the_engine_is_not_sent(prompt, message):
    servers = FakeServers()
    with sampler(servers, 4) as engines, pytest.raises(ValueError, match=message):
        in_order(engines, [[1], prompt], 1)
    assert servers.calls == []


def test_wrong_use():
    with pytest.raises(ValueError, match="no engines"):
        EngineSampler([], Sampling(1), max_concurrent=1, timeout_s=1, vocabulary=2)
    with sampler(FakeServers(), 4) as engines, pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        in_order(engines, PROMPTS[:2], 1, seeds=[1])
    engines.close()  # a second time does nothing


def test_memory_is_released_by_every_engine_once_it_is_idle():
    servers = FakeServers()
    with sampler(servers, 4) as engines:
        engines.release_memory(["kv_cache", "weights"])
        engines.resume_memory(["kv_cache", "weights"])
    for engine in ("a:1", "b:2"):
        calls = [(path, body) for host, path, body in servers.calls if host == engine]
        assert calls == [
            ("/flush_cache", None),
            ("/release_memory_occupation", {"tags": ["kv_cache", "weights"]}),
            ("/resume_memory_occupation", {"tags": ["kv_cache", "weights"]}),
        ]


def test_a_busy_engine_keeps_its_memory():
    busy = FakeServers({"/flush_cache": lambda host, body: httpx.Response(400, text="requests are running")})
    with sampler(busy, 4) as engines, pytest.raises(EngineRefused, match="requests are running"):
        engines.release_memory(["kv_cache"])
    assert "/release_memory_occupation" not in busy.paths()


def test_an_engine_without_memory_saver_is_refused_with_the_flag():
    with (
        sampler(FakeServers(), 4) as engines,
        pytest.raises(EngineRefused, match=r"a:1: it shares.*Start it with --enable-memory-saver"),
    ):
        engines.require_memory_saver()
    able = {"tp_size": 1, "dp_size": 1, "enable_memory_saver": True}
    with sampler(FakeServers({"/server_info": lambda host, body: able}), 4) as engines:
        engines.require_memory_saver()
