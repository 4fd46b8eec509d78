"""This module opens the stores in which the processes of a run meet."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

_stores: list[TCPStore] = []
"""This process's part of the ranks' store. It is opened only once, because its port can be opened only once."""


def store_on(host: str, size: int | None = None, timeout: timedelta = timedelta(minutes=5), port: int = 0) -> TCPStore:
    """Open the rendezvous store of `size` ranks on `port` (0: a free one, see `store.port`) of `host` only.

    A store that opens its port itself would listen on every interface.
    """
    with socket.create_server((host, port), backlog=1024) as listener:
        port = listener.getsockname()[1]
        return TCPStore(
            host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )


def ranks_store(timeout: timedelta) -> TCPStore:
    """Return the store at MASTER_ADDR:MASTER_PORT where the launcher's ranks meet; `timeout` bounds this process's
    calls.

    torchrun and this package's launcher host the store. Under srun rank 0 hosts it, and listens on the address that the
    others connect to, or on all if that address cannot be known (`master_address`). Raises TimeoutError when rank 0 has
    not opened it in time, and OSError when the port is taken.
    """
    if not _stores:
        _stores.append(_open(timeout))
    _stores[0].set_timeout(timeout)
    return _stores[0]


def _open(timeout: timedelta) -> TCPStore:
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = master_address()
    try:
        if hosts and address is not None:
            return store_on(address, None, timeout, port)
        return TCPStore(name, port, None, hosts, timeout, wait_for_workers=False)
    except OSError as error:
        raise OSError(
            f"rank 0 cannot listen at {address or name}:{port} ({error.strerror}); set MASTER_ADDR to an address of "
            "its machine and MASTER_PORT to a free port"
        ) from error
    except DistError as error:
        raise TimeoutError(
            f"rank {os.environ['RANK']}: the ranks' store at {name}:{port} did not answer within "
            f"{timeout.total_seconds():g} s ({error}); check that rank 0 was started and that no firewall is in between"
        ) from error


def start_key(name: str) -> str:
    """Return a key for the store that is of this start alone: torchrun's store outlives its restarts of the ranks."""
    return f"fiberpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def first_ranks_text(
    name: str, make: Callable[[], str], timeout: timedelta, store: Any = None, rank: int | None = None
) -> str:
    """Return on every rank what `make` returns on rank 0, which alone calls it.

    `name` is that of the text in the store and in messages. `store` and `rank` are those of this process if they are
    not given. An error of `make` is raised on rank 0; the others raise RuntimeError with it, or TimeoutError when
    rank 0 says nothing in time.
    """
    store = ranks_store(timeout) if store is None else store
    key = start_key(name)
    if (int(os.environ["RANK"]) if rank is None else rank) == 0:
        try:
            text = make()
        except Exception as error:
            store.set(key, f"-{error}")
            raise
        store.set(key, f"+{text}")
        return text
    try:
        store.wait([key], timeout)
    except DistError as error:
        raise TimeoutError(f"rank 0 did not share {name} within {timeout.total_seconds():g} s ({error})") from error
    said = str(store.get(key).decode())
    if said.startswith("-"):
        raise RuntimeError(f"reading {name} failed on rank 0: {said[1:]}")
    return said[1:]


def master_address() -> str | None:
    """Return the IPv4 address of MASTER_ADDR as every rank sees it, or None.

    It is None if MASTER_ADDR has no address, or if rank 0's machine has only a loopback address under its own name
    (Debian's 127.0.1.1), which differs from what the others see.
    """
    name = os.environ["MASTER_ADDR"]
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return None
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if address.startswith("127.") and name not in (address, "localhost") and not one_machine:
        return None
    return address
