"""Engines of other machines: registered, missing, failed."""

import threading
from pathlib import Path

import pytest

from fiberpo_megatron import durable
from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.errors import EngineStartError
from fiberpo_megatron.engines.registry import Registry
from fiberpo_megatron.engines.servers import Offer


def offers(*addresses: EngineAddress) -> list[Offer]:
    """Servers of a host that are healthy."""
    return [Offer(str(number), address) for number, address in enumerate(addresses)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    folder = tmp_path / "slurm/7.1/engines"
    folder.mkdir(parents=True)
    (folder / "hosts").write_text("n3\nn4\n")
    (folder / "api_key").write_text("secret\n")
    (folder / "api_key").chmod(0o600)
    return Registry(folder)


def test_addresses_come_in_the_order_of_the_hosts_with_the_key(registry: Registry, tmp_path: Path):
    log = tmp_path / "engine_0.log"
    n4, n3 = [EngineAddress("http://n4:1", log)], [EngineAddress("http://n3:1"), EngineAddress("http://n3:2")]
    registry.register("n4", offers(*n4))
    threading.Timer(0.5, registry.register, ["n3", offers(*n3)]).start()
    found = registry.wait(30)
    assert [e.url for e in found] == ["http://n3:1", "http://n3:2", "http://n4:1"]
    assert {e.api_key for e in found} == {"secret"} and found[2].log == log
    assert "secret" not in "".join(p.read_text() for p in registry.folder.glob("*.json"))


def test_no_key_stays_once_the_run_has_ended(registry: Registry, tmp_path: Path):
    """Neither this job's, nor that of one which was killed while it started. Until then further hosts may join."""
    killed, other = tmp_path / "slurm/6.0/engines/api_key", tmp_path / "slurm/6.0/engines/hosts"
    killed.parent.mkdir(parents=True)
    killed.touch()
    other.touch()
    registry.register("n3", offers(EngineAddress("http://n3:1")))
    with pytest.raises(EngineStartError):
        registry.wait(0.1)
    registry.register("n4", offers(EngineAddress("http://n4:1")))
    registry.wait(30)
    assert list(tmp_path.rglob("api_key")) == [registry.folder / "api_key"]
    registry.close()
    assert not list(tmp_path.rglob("api_key")) and other.exists()


def test_who_is_missing_is_named_after_the_deadline(registry: Registry):
    registry.register("n3", offers(EngineAddress("http://n3:1")))
    with pytest.raises(EngineStartError, match="engine n4: 1 of 2 hosts have registered no engine after 0 s"):
        registry.wait(0.3)


def test_a_host_that_failed_ends_the_wait_at_once(registry: Registry):
    registry.fail("n4", "port 18000 is in use")
    with pytest.raises(EngineStartError, match="engine on n4: port 18000 is in use"):
        registry.wait(600)


def test_a_folder_that_is_none(tmp_path: Path):
    with pytest.raises(ValueError, match="which names the engines' hosts, cannot be read"):
        Registry(tmp_path).wait(1)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 10**5, b"{}", b'{"engines": 3}', b'{"engines": [{"url": "http://n4:1"}]}',
     b'{"engines": [{"url": 7, "log": 7}]}'],
)  # fmt: skip
def test_a_file_that_says_no_servers_is_named(registry: Registry, content: bytes):
    registry.register("n3", offers(EngineAddress("http://n3:1")))
    (registry.folder / "n4.json").write_bytes(content)
    with pytest.raises(EngineStartError, match=r"engine on n4: .*n4\.json does not say where its servers are"):
        registry.wait(1)


def test_what_a_host_says_does_not_steer_a_terminal(registry: Registry):
    registry.fail("n4", "its log ends with \x1b]0;title\x07 \u2028 \ud83d\nand a line")
    with pytest.raises(EngineStartError, match=r"ends with \\x1b\]0;title\\x07 \\u2028 \\ud83d\nand a line"):
        registry.wait(1)


def test_the_folder_is_synced_after_a_host_has_registered(registry: Registry, monkeypatch):
    synced = []
    monkeypatch.setattr(durable, "sync", synced.append)
    registry.register("n3", offers(EngineAddress("http://n3:1")))
    assert synced == [registry.folder] and sorted(p.name for p in registry.folder.iterdir()) == [
        "api_key", "hosts", "n3.json"
    ]  # fmt: skip


def test_hosts_join_leave_fail_and_start_servers_again(registry: Registry):
    registry.register("n4", offers(EngineAddress("http://n4:1")))
    registry.register("n3", offers(EngineAddress("http://n3:1"), EngineAddress("http://n3:2")))
    registry.register("n1", offers(EngineAddress("http://n1:1")))
    assert [o.place for o in registry.offers()] == ["n3/0", "n3/1", "n4/0", "n1/0"], "those of the job come first"
    again = Offer("0", EngineAddress("http://n3:9"), generation=1)
    registry.register("n3", [again, Offer("1", None, 1, "signal SIGKILL", starting=True)])
    registry.fail("n4", "no space left")
    registry.leave("n1")
    found = {offer.place: offer for offer in registry.offers()}
    assert set(found) == {"n3/0", "n3/1", "n4/0"}
    assert found["n3/0"].address.url == "http://n3:9" and found["n3/0"].generation == 1
    assert found["n3/1"].address is None and found["n3/1"].starting and found["n3/1"].detail == "signal SIGKILL"
    assert found["n4/0"].address is None and not found["n4/0"].starting and found["n4/0"].detail == "no space left"


def test_a_run_asks_a_host_for_another_server(registry: Registry):
    registry.replace("n3/1", 4, "it computes something else")
    registry.replace("n4/0", 0, "it hangs")
    assert registry.replacements("n3") == {"1": (4, "it computes something else")}
    assert registry.replacements("n3") == {} and registry.replacements("n4") == {"0": (0, "it hangs")}
