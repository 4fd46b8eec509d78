"""Order, balance, the limit on concurrency and the first error, against fake servers."""

import httpx
import pytest

from fiberpo_megatron.rollout.client import EngineAddress, Sampling
from fiberpo_megatron.rollout.errors import EngineRefused
from fiberpo_megatron.rollout.generate import EngineSampler, response_seeds
from tests.rollout.fake_server import FakeServers

ENGINES = [EngineAddress("http://a:1"), EngineAddress("http://b:2")]
PROMPTS = [[10 + i, 2, 3] for i in range(7)]


def sampler(servers: FakeServers, max_concurrent: int, **options) -> EngineSampler:
    return EngineSampler(
        ENGINES,
        Sampling(2),
        max_concurrent=max_concurrent,
        timeout_s=5,
        vocabulary=32,
        transport=servers,
        **options,
    )


@pytest.mark.parametrize("max_concurrent", [1, 4, 21, 1000])
def test_responses_come_in_order_whatever_the_requests(max_concurrent):
    servers = FakeServers(delay_s=0.005)
    with sampler(servers, max_concurrent) as engines:
        groups = engines.sample(PROMPTS, 3)
    assert [[c.token_ids[0] for c in group] for group in groups] == [[p[0]] * 3 for p in PROMPTS]
    assert engines.sample is not None and servers.most_running <= max(max_concurrent, 2 * 3)
    assert {host for host, _, _ in servers.calls} == {"a:1", "b:2"}


def test_what_fits_travels_as_one_request_per_engine():
    servers = FakeServers()
    with sampler(servers, 21) as engines:
        engines.sample(PROMPTS, 3)
        assert [(host, len(body["input_ids"])) for host, _, body in servers.calls] == [("a:1", 9), ("b:2", 12)]
        servers.calls.clear()
        engines.sample(PROMPTS[:1], 3)
        assert [len(body["input_ids"]) for _, _, body in servers.calls] == [3]


def test_no_prompts_is_no_request():
    servers = FakeServers()
    with sampler(servers, 4) as engines:
        assert engines.sample([], 3) == []
    assert servers.calls == []


def test_more_than_the_limit_goes_prompt_by_prompt_to_the_less_busy_engine():
    servers = FakeServers(delay_s=0.01)
    with sampler(servers, 6) as engines:
        engines.sample(PROMPTS, 3)
    sizes = [len(body["input_ids"]) for _, _, body in servers.calls]
    assert sizes == [3] * 7 and servers.most_running == 6
    hosts = [host for host, _, _ in servers.calls]
    assert abs(hosts.count("a:1") - hosts.count("b:2")) <= 1


def test_progress_counts_prompts():
    seen: list[tuple[int, int]] = []
    with sampler(FakeServers(), 3, progress=lambda done, total: seen.append((done, total))) as engines:
        engines.sample(PROMPTS, 3)
    assert seen == [(i + 1, 7) for i in range(7)]


def test_the_first_failure_is_raised_and_nothing_is_sent_after_it():
    def refuse(host, body):
        return httpx.Response(500, json={"message": "out of memory"})

    servers = FakeServers({"/generate": refuse}, delay_s=0.02)
    with sampler(servers, 3) as engines, pytest.raises(EngineRefused, match="http://a:1.*out of memory"):
        engines.sample(PROMPTS, 3)
    assert 1 <= len(servers.calls) < len(PROMPTS)


def test_seeds_are_one_per_response_and_depend_on_the_prompts_seed_alone():
    servers = FakeServers()
    with sampler(servers, 100) as engines:
        engines.sample(PROMPTS[:2], 3, seeds=[5, 6])
        engines.sample(PROMPTS[1:2], 3, seeds=[6])
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
        engines.sample([[1], prompt], 1)
    assert servers.calls == []


def test_wrong_use():
    with pytest.raises(ValueError, match="no engines"):
        EngineSampler([], Sampling(1), max_concurrent=1, timeout_s=1, vocabulary=2)
    with sampler(FakeServers(), 4) as engines, pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        engines.sample(PROMPTS[:2], 1, seeds=[1])
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
