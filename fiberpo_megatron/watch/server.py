"""This module opens the port of the page and serves it until somebody stops it."""

import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from fiberpo_megatron.watch.app import application
from fiberpo_megatron.watch.guard import LOOPBACK

FIRST_PORT = 8420
"""The port of the page unless another is asked for; if it is taken, one that is free."""


class PortTaken(ValueError):
    """The address cannot be listened on."""


def keys_of(folders: Sequence[Path]) -> dict[str, Path]:
    """Return each folder under a short key for addresses. Raises ValueError for what is no folder, or comes twice."""
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the folder of a run, which holds metrics.jsonl")
        if folder.resolve() in {other.resolve() for other in found.values()}:
            raise ValueError(f"{folder} is given twice")
        found[str(len(found))] = folder
    return found


def serve(folders: Sequence[Path], host: str, port: int | None, *, ask_token: bool = False) -> None:
    """Serve the page of some runs until the process is interrupted, and print its address.

    Args:
        folders: the run folders.
        host: the address to listen on. Any but a loopback address makes the page ask for a random token.
        port: the port; None takes FIRST_PORT, or a free one.
        ask_token: whether a token is asked for on a loopback address too, where other users of the machine could read.

    Raises:
        ValueError: if a folder is none, or the port cannot be opened.
    """
    runs = keys_of(folders)
    token = secrets.token_urlsafe(24) if ask_token or host not in LOOPBACK else ""
    app = application(runs, hosts=names_of(host), token=token)
    opened = open_port(host, port)
    number = opened.getsockname()[1]
    shown = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    shown = f"[{shown}]" if ":" in shown else shown
    print(f"Watching {', '.join(map(str, folders))}")
    print(f"http://{shown}:{number}/{f'{token}/' if token else ''}", flush=True)
    print("Ctrl-C ends it. Nothing is written into the folders.", file=sys.stderr, flush=True)
    # the access log would hold the token
    config = uvicorn.Config(
        app, http="h11", ws="none", loop="asyncio", log_level="warning", access_log=False, server_header=False
    )
    with opened:
        uvicorn.Server(config).run(sockets=[opened])


def names_of(host: str) -> frozenset[str]:
    """Return the names by which a server that listens on `host` may be asked for."""
    if host in LOOPBACK:
        return LOOPBACK
    return LOOPBACK | {name.lower() for name in (host, socket.gethostname(), socket.getfqdn())}


def open_port(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens. Raises PortTaken, a ValueError, which names host and port."""
    ports = [FIRST_PORT, 0] if port is None else [port]
    errors = []
    for number in ports:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            opened = socket.socket(family, kind, protocol)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                opened.bind(address)
                opened.listen(128)
            except OSError:
                opened.close()
                raise
            return opened
        except OSError as error:
            errors.append(error)
    raise PortTaken(f"--host {host}, --port {ports[0]} cannot be opened ({errors[-1]}); choose another with --port")
