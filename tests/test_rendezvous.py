"""Where ranks that srun starts meet."""

import os
import socket
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore

from fiberpo_megatron import rendezvous
from fiberpo_megatron.engines.addresses import free_ports, listen_towards_master
from fiberpo_megatron.rendezvous import master_address, ranks_store

SECOND = timedelta(seconds=1)


@pytest.fixture(autouse=True)
def rank_zero_of_two(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(rendezvous, "_stores", [])
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    (port,) = free_ports(1, "127.0.0.1")
    values = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return port


def interface_towards_master(monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    listen_towards_master()
    return os.environ.pop("GLOO_SOCKET_IFNAME", None)


def listening(port: int) -> set[str]:
    sockets = psutil.Process(os.getpid()).net_connections("inet")
    return {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_rank_zero_holds_the_store_on_one_address(rank_zero_of_two: int):
    store = ranks_store(SECOND)
    assert ranks_store(SECOND) is store, "opened once: the port can be"
    assert listening(rank_zero_of_two) == {"127.0.0.1"}
    other = TCPStore("127.0.0.1", rank_zero_of_two, None, False, SECOND, wait_for_workers=False)
    other.set("here/1", "yes")
    assert store.get("here/1") == b"yes"


def test_a_name_that_is_loopback_to_its_own_machine_alone(rank_zero_of_two: int, monkeypatch: pytest.MonkeyPatch):
    """Debian's 127.0.1.1: the other machines see another address, which rank 0 cannot know. It listens on all."""
    assert master_address() == "127.0.0.1" and interface_towards_master(monkeypatch) == "lo"
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert master_address() is None and interface_towards_master(monkeypatch) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert master_address() == "127.0.1.1", "all ranks are here"


def test_what_is_in_the_way_is_said(rank_zero_of_two: int, monkeypatch: pytest.MonkeyPatch):
    busy = pytest.raises(OSError, match="rank 0 cannot listen at 127.0.0.1:.*MASTER_PORT to a free port")
    with socket.create_server(("127.0.0.1", rank_zero_of_two)), busy:
        ranks_store(SECOND)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # of no machine
    with pytest.raises(OSError, match="set MASTER_ADDR to an address of its machine"):
        ranks_store(SECOND)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TimeoutError, match="rank 1: the ranks' store at 127.0.0.1:.* check that rank 0 was started"):
        ranks_store(SECOND)
