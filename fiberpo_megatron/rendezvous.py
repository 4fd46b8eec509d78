"""Where processes of a run meet."""

import os
import socket
from datetime import timedelta

from torch.distributed import DistError, TCPStore

_stores: list[TCPStore] = []
"""This process's part of the ranks' store: opened once, because its port can be."""


def store_on(host: str, size: int | None = None, timeout: timedelta = timedelta(minutes=5), port: int = 0) -> TCPStore:
    """The rendezvous store of `size` ranks on `port` (0: a free one, see `store.port`) of `host` alone: a store that
    opens its port itself listens on every interface."""
    with socket.create_server((host, port), backlog=1024) as listener:
        port = listener.getsockname()[1]
        return TCPStore(
            host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )


def ranks_store(timeout: timedelta) -> TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT in which the launcher's ranks meet, with `timeout` for this process's calls.

    torchrun and our own launcher hold it themselves. Under srun rank 0 does, and listens on the address that the others
    connect to; where that is not to be known (`master_address`), on all. Raises TimeoutError when rank 0 is not there
    in time, OSError when the port is taken.
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
            f"rank {os.environ['RANK']}: the ranks' store at {name}:{port} was not there within "
            f"{timeout.total_seconds():g} s ({error}); check that rank 0 was started, and the firewall between"
        ) from error


def master_address() -> str | None:
    """IPv4 address of MASTER_ADDR as every rank sees it. None where there is none, and where rank 0's machine has only
    a loopback address under its own name (Debian's 127.0.1.1), which is not what the others see."""
    name = os.environ["MASTER_ADDR"]
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return None
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if address.startswith("127.") and name not in (address, "localhost") and not one_machine:
        return None
    return address
