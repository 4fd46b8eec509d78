"""Where processes of a run meet."""

import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore


def store_on(host: str, size: int | None = None, timeout: timedelta = timedelta(minutes=5)) -> TCPStore:
    """The rendezvous store of `size` ranks on a free port (`store.port`) of `host` alone: a store that opens its port
    itself listens on every interface."""
    with socket.create_server((host, 0), backlog=1024) as listener:
        port = listener.getsockname()[1]
        return TCPStore(
            host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
