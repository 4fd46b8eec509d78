"""This module chooses where a server listens: the address that its clients reach and no other, and a free port."""

import os
import random
import socket
from collections.abc import Iterable

import psutil

from fiberpo_megatron.rendezvous import master_address

LOWEST, HIGHEST = 18000, 21999
"""The range lies below the kernel's ephemeral ports, which connections use, and below SGLang's own (from 22000)."""


def is_free(port: int, host: str) -> bool:
    """Return whether a server could listen on host:port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, host: str) -> list[int]:
    """Return `count` different free ports, drawn at random so that two runs on a machine rarely want the same."""
    found: list[int] = []
    for port in random.Random().sample(range(LOWEST, HIGHEST + 1), HIGHEST + 1 - LOWEST):
        if len(found) == count:
            break
        if is_free(port, host):
            found.append(port)
    if len(found) < count:
        raise RuntimeError(
            f"{count} free ports are needed on {host}, but {len(found)} were found in {LOWEST}-{HIGHEST}"
        )
    return found


def local_address(peers: Iterable[str]) -> str:
    """Return the IPv4 address of this machine that every one of `peers` (names or addresses) reaches.

    This is loopback when all of them are this machine, else the address from which packets to the first other machine
    leave. Raises OSError for a name without an address.
    """
    for peer in peers:
        remote = socket.gethostbyname(peer)
        if remote.startswith("127."):
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((remote, 9))  # this sends nothing: the kernel only chooses the route
            source = str(probe.getsockname()[0])
        if source != remote:
            return source
    return "127.0.0.1"


def interface_of(host: str) -> str | None:
    """Return the name of the network interface with this address (or name); None when no interface has it."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    return None


def listen_towards_master() -> None:
    """Make gloo listen on the interface through which this machine reaches rank 0's, under torchrun or srun.

    By default gloo listens on the address of the host's name, which machines outside the job may reach.
    """
    if "MASTER_ADDR" not in os.environ or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = master_address()
    interface = address and (interface_of(address) or interface_of(local_address([address])))
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
