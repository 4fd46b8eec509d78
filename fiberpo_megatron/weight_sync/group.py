"""The process group of trainer rank 0 and the engines, outside torch's default group.

It is built from torch's backend class alone and registered nowhere: the trainer's own groups (and Megatron's)
stay untouched, and an eagerly initialised default group is not split for it. The store prefixes are those
under which SGLang (`init_custom_process_group`) and torch (`_new_process_group_helper`) look for the others.
"""

import socket
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import BackendConfig


def store_host(engine_urls: list[str]) -> str:
    """The address at which every engine reaches this process: loopback when all of them are local."""
    hosts = {urlsplit(url).hostname or "" for url in engine_urls}
    if all(host == "localhost" or host.startswith("127.") for host in hosts):
        return "127.0.0.1"
    remote = next(h for h in sorted(hosts) if h != "localhost" and not h.startswith("127."))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((remote, 9))  # sends nothing: the kernel only chooses the route
        return str(probe.getsockname()[0])


class UpdateGroup:
    """Rank 0 of `size` ranks; the engines are the others.

    `connect` blocks until all have joined (gloo), or returns at once and the first broadcast waits (NCCL).
    """

    def __init__(self, name: str, backend: str, host: str, size: int, timeout_s: float) -> None:
        self.name, self.backend, self.size = name, backend, size
        self.timeout = timedelta(seconds=timeout_s)
        self.host = host
        self._store = dist.TCPStore(host, 0, size, True, self.timeout, wait_for_workers=False)
        self._group: Any = None

    @property
    def port(self) -> int:
        """Port of the rendezvous store."""
        return int(self._store.port)

    def connect(self) -> None:
        """Join as rank 0."""
        device = next(iter(BackendConfig(dist.Backend(self.backend)).get_device_backend_map()))
        store: Any = self._store
        for prefix in (self.name, f"{self.name}/", f"{device}/"):
            store = dist.PrefixStore(prefix, store)
        if self.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.timeout
            self._group = dist.ProcessGroupNCCL(store, 0, self.size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, 0, self.size, self.timeout)

    def broadcast(self, tensor: Tensor) -> None:
        """Send `tensor`; returns when it was sent.

        Without the others it blocks for the group's timeout, and then raises RuntimeError; so call it from a
        thread that may be left behind.
        """
        group = self._group  # keeps it alive while it is used: gloo's destructor waits for pending operations
        options = dist.BroadcastOptions()
        options.rootRank = 0
        group.broadcast([tensor], options).wait()
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None and self.backend == "nccl":
            self._group.abort()  # ends a broadcast that the others take no part in
        self._group = None
