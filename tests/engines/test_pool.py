"""The pool of engines: calls to all of them, memory, closing."""

import asyncio

import httpx
import pytest

from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.errors import EngineRefused
from fiberpo_megatron.engines.pool import EnginePool
from tests.engines.fake_server import FakeServers

ADDRESSES = [EngineAddress("http://a:1"), EngineAddress("http://b:2")]


def pool_of(servers: FakeServers, loop: BackgroundLoop | None = None) -> EnginePool:
    return EnginePool(ADDRESSES, timeout_s=5, transport=servers, loop=loop)


def test_wrong_use():
    with pytest.raises(ValueError, match=r"no engines; give rollout\.engine\.urls"):
        EnginePool([], timeout_s=1)
    with pool_of(FakeServers()) as pool, pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        pool.run(pool.clients[0].generate([[1], [2]], Sampling(1), seeds=[1]))
    pool.close()  # a second time does nothing
    for start in (pool.run, pool.submit):
        with pytest.raises(RuntimeError, match="the engine pool is closed; make another one"):
            start(asyncio.sleep(0))


def test_a_call_to_all_returns_by_engine_and_runs_at_once():
    servers = FakeServers({"/model_info": lambda host, _: {"model_path": host, "weight_version": "1"}}, delay_s=0.1)
    with pool_of(servers) as pool:
        infos = pool.on_all(lambda client: client.model_info())
    assert [info.model_path for info in infos] == ["a:1", "b:2"]
    assert [host for host, _, _ in servers.calls] == ["a:1", "b:2"]


def test_the_first_error_is_raised_when_all_have_answered():
    """A control call must not leave engines in different states because one of them refused it."""
    answered = []

    async def call(client):
        if client.url == "http://a:1":
            raise ValueError("a refuses")
        await asyncio.sleep(0.05)
        answered.append(client.url)

    with pool_of(FakeServers()) as pool, pytest.raises(ValueError, match="a refuses"):
        pool.on_all(call)
    assert answered == ["http://b:2"]


def test_an_interrupt_cancels_the_work():
    cancelled = []

    async def work():
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pool_of(FakeServers()) as pool:
        future = pool.submit(work())
        pool.run(asyncio.sleep(0))
        future.cancel()
        pool.run(asyncio.sleep(0.01))
    assert cancelled == [True]


def test_a_loop_of_somebody_else_keeps_running():
    loop = BackgroundLoop("shared")
    with pool_of(FakeServers(), loop) as pool:
        assert pool.run(asyncio.sleep(0, "works")) == "works"
    assert loop.run(asyncio.sleep(0, "still works")) == "still works"
    loop.close()


def test_memory_is_released_by_every_engine_once_it_is_idle():
    servers = FakeServers()
    with pool_of(servers) as pool:
        pool.release_memory(["kv_cache", "weights"])
        pool.resume_memory(["kv_cache", "weights"])
    for engine in ("a:1", "b:2"):
        calls = [(path, body) for host, path, body in servers.calls if host == engine]
        assert calls == [
            ("/flush_cache", None),
            ("/release_memory_occupation", {"tags": ["kv_cache", "weights"]}),
            ("/resume_memory_occupation", {"tags": ["kv_cache", "weights"]}),
        ]


def test_a_busy_engine_keeps_its_memory():
    busy = FakeServers({"/flush_cache": lambda host, body: httpx.Response(400, text="requests are running")})
    with pool_of(busy) as pool, pytest.raises(EngineRefused, match="requests are running"):
        pool.release_memory(["kv_cache"])
    assert "/release_memory_occupation" not in busy.paths()


def test_an_engine_without_memory_saver_is_refused_with_the_flag():
    with (
        pool_of(FakeServers()) as pool,
        pytest.raises(EngineRefused, match=r"a:1: it shares.*Start it with --enable-memory-saver"),
    ):
        pool.require_memory_saver()
    able = {"tp_size": 1, "dp_size": 1, "enable_memory_saver": True}
    with pool_of(FakeServers({"/server_info": lambda host, body: able})) as pool:
        pool.require_memory_saver()
