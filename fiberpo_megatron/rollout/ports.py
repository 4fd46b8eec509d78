"""Free TCP ports for servers that bind them seconds later."""

import random
import socket

LOWEST, HIGHEST = 18000, 21999
"""Below the kernel's ephemeral range, used by connections, and below SGLang's own picks (from 22000)."""


def is_free(port: int, host: str) -> bool:
    """Whether a server could listen on host:port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, host: str) -> list[int]:
    """`count` different free ports, drawn at random so that two runs on a machine rarely want the same."""
    found: list[int] = []
    for port in random.Random().sample(range(LOWEST, HIGHEST + 1), HIGHEST + 1 - LOWEST):
        if len(found) == count:
            break
        if is_free(port, host):
            found.append(port)
    if len(found) < count:
        raise RuntimeError(f"{count} free ports are needed on {host}, {len(found)} found in {LOWEST}-{HIGHEST}")
    return found
