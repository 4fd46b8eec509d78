"""Which servers are refused by what they say about themselves."""

import asyncio

import pytest

from fiberpo_megatron.engines.client import EngineAddress, EngineClient
from fiberpo_megatron.engines.errors import EngineRefused
from fiberpo_megatron.engines.known_faults import known_faults
from tests.engines.fake_server import FakeServers


@pytest.mark.parametrize("version", ["0.5.23", "0.5.24", "0.6.0.post1", "1.0.0rc1", "0.0.0.dev0+g12", "main", None, 5])
def test_a_server_of_a_sound_version(version: object):
    assert known_faults({"version": version, "hicache_storage_backend": None}) == []
    assert known_faults({"version": version}) == []


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"version": "0.5.22"}, r"it is SGLang 0.5.22, which keeps prefixes of old weights .*#33783.*use 0.5.23"),
        ({"version": "0.4.10.post2"}, "it is SGLang 0.4.10.post2"),
        ({"version": "0.5.23", "hicache_storage_backend": "file"}, "hicache_storage_backend = 'file'.*#26792"),
    ],
)
def test_a_server_with_a_fault_is_refused_and_named(info: dict[str, object], message: str):
    async def ask() -> None:
        servers = FakeServers({"/server_info": lambda host, body: info})
        async with EngineClient(EngineAddress("http://a:1"), timeout_s=5, transport=servers) as client:
            with pytest.raises(EngineRefused, match=f"engine http://a:1: .*{message}"):
                await client.check_preferences()

    asyncio.run(ask())
