"""Requests for tokens through a real sglang-router."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fiberpo_megatron.engines.addresses import free_ports
from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.errors import EngineError, EngineRefused, EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.router import RouterClient
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.rollout.fleet import Fleet
from fiberpo_megatron.rollout.sampler import EngineSampler
from tests.engines.fake_server import FakeServers
from tests.rollout.test_fleet import Places
from tests.trainer.toy import SingleLayout

PROMPT = [3, 4, 5]


@pytest.fixture
def router(tmp_path: Path) -> Iterator[str]:
    """The address of a router without workers."""
    port, metrics = free_ports(2, "127.0.0.1")
    words = ["-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--prometheus-port", str(metrics), "--disable-retries"]
    with (tmp_path / "router.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "router.log").read_text()
            try:
                httpx.get(f"{url}/workers", trust_env=False, timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the router is a child of what was started
        process.wait()


@pytest.mark.sglang
def test_what_goes_through_the_router_is_what_the_engine_gives(router: str, engine: EngineAddress):
    """The fleet puts the engine on the router's list after its verification; then tokens, log-probs and version are
    those of a direct request, and nothing is left on the list of an engine that is quarantined."""
    sampling = Sampling(12)
    plain = EngineAddress(engine.url, api_key=engine.api_key)
    with EnginePool([plain], timeout_s=60) as pool:
        client = RouterClient(EngineAddress(router), 60, 64)
        sampler = EngineSampler(pool, sampling, max_concurrent=64, vocabulary=64, router=client)
        places = Places(engine.url.removeprefix("http://"))
        fleet = Fleet(SingleLayout(), pool, places, sampler, router=client)  # type: ignore[arg-type]
        with fleet.publication():
            assert pool.run(client.workers()) == {}, "no worker before its weights"
            fleet.published("checkpoint")
        fleet.verified()
        assert list(pool.run(client.workers())) == [engine.url]
        routed = pool.run(sampler.sample(PROMPT, [1, 2, 3], priority=1))
        direct = pool.run(pool.clients[0].generate([PROMPT] * 3, sampling, seeds=[1, 2, 3]))
        for one, other in zip(routed, direct, strict=True):
            assert one.token_ids == other.token_ids and one.weight_spans == other.weight_spans
            assert abs(one.log_probs - other.log_probs).max() < 1e-5 and one.finish_reason == other.finish_reason
            assert set(one.engines.tolist()) == {0}  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="drops the request for routed experts"):
            pool.run(client.generate([PROMPT], sampling, routing=RoutingShape(2, 2, 4)))
        pool.run(client.keep([]))
        assert pool.run(client.workers()) == {}
        with pytest.raises((EngineUnreachable, EngineRefused)):
            pool.run(client.generate([PROMPT], sampling))
        pool.run(client.close())


def test_an_engine_that_the_router_does_not_reach_is_asked_again_and_other_refusals_are_not():
    answers: list[Any] = [httpx.Response(502, text="bad gateway"), httpx.Response(422, text="no such field")]

    def generate(host: str, body: Any) -> Any:
        return answers[0]

    async def ask() -> None:
        client = RouterClient(EngineAddress("http://r:1"), 5, 4, FakeServers({"/generate": generate}))
        with pytest.raises(EngineUnreachable, match="the router reached no engine .*HTTP 502: bad gateway"):
            await client.generate([PROMPT], Sampling(2))
        answers.reverse()
        with pytest.raises(EngineRefused, match="HTTP 422: no such field"):
            await client.generate([PROMPT], Sampling(2))
        await client.close()

    asyncio.run(ask())


def test_a_router_that_does_not_take_the_engines_is_named():
    async def ask() -> None:
        servers = FakeServers({"/workers": lambda host, body: {"workers": [{"url": "http://other:1", "id": "7"}]}})
        client = RouterClient(EngineAddress("http://r:1"), 5, 4, servers)
        with pytest.raises(EngineError, match=r"should use \['http://a:1'\], but uses \['http://other:1'\]"):
            await client.keep(["http://a:1"], timeout_s=0.2)
        await client.close()
        assert {path for _, path, _ in servers.calls} == {"/workers", "/workers/7"}

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no urls of servers behind it"),
        ({"urls": ["http://a:1"], "api_key_file": "key"}, "an API key, which the router does not pass on"),
    ],
)
def test_settings_that_no_router_can_serve_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EngineConfig.model_validate({"router_url": "http://r:1", **settings})
    assert EngineConfig(router_url="http://r:1", urls=["http://a:1"]).router_url == "http://r:1"


def test_more_engines_cannot_be_healthy_than_there_are():
    with pytest.raises(ValueError, match="min_healthy = 3, but urls names 1 servers"):
        EngineConfig(urls=["http://a:1"], min_healthy=3)
