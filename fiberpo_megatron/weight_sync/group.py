"""This module makes the process group of trainer rank 0 and the engines, outside torch's default group.

It is built from torch's backend class alone and is registered nowhere. The trainer's own groups (and Megatron's) stay
untouched, and an eagerly initialised default group is not split for it. The store prefixes are those
under which SGLang (`init_custom_process_group`) and torch (`_new_process_group_helper`) look for the others.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import BackendConfig

from fiberpo_megatron.rendezvous import store_on


class UpdateGroup:
    """This is rank 0 of a group of `size` ranks; the engines are the others.

    `connect` blocks until all have joined (gloo), or returns at once and the first broadcast waits (NCCL).
    """

    def __init__(self, name: str, backend: str, host: str, size: int, timeout_s: float) -> None:
        self.name, self.backend, self.size = name, backend, size
        self.timeout = timedelta(seconds=timeout_s)
        self.host = host
        self._store: dist.TCPStore | None = store_on(host, size, self.timeout)
        self.port = int(self._store.port)
        """The port of the rendezvous store."""
        self._group: Any = None

    def connect(self) -> None:
        """Join the group as rank 0. Raises RuntimeError when the group is closed meanwhile."""
        device = next(iter(BackendConfig(dist.Backend(self.backend)).get_device_backend_map()))
        # It is a client like the engines: were it the host, it would keep the store alive for as long as it waits.
        store: Any = dist.TCPStore(self.host, self.port, None, False, self.timeout, wait_for_workers=False)
        for prefix in (self.name, f"{self.name}/", f"{device}/"):
            store = dist.PrefixStore(prefix, store)
        if self.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.timeout
            self._group = dist.ProcessGroupNCCL(store, 0, self.size, options)
        else:
            kind: Any = dist.ProcessGroupGloo
            gloo = kind._Options()
            gloo._timeout = self.timeout
            gloo._devices = [kind.create_device(hostname=self.host)]  # listens on that address
            self._group = kind(store, 0, self.size, gloo)

    def broadcast(self, tensor: Tensor) -> None:
        """Send `tensor` to all engines and return when it was sent.

        The tensor's contents must be complete. When the others do not take part it blocks for the group's timeout and
        then raises RuntimeError, so call it from a thread that may be left behind.
        """
        group = self._group  # keeps it alive while it is used: gloo's destructor waits for pending operations
        options = dist.BroadcastOptions()
        options.rootRank = 0
        if not tensor.is_cuda:
            group.broadcast([tensor], options).wait()
            return
        stream = torch.cuda.Stream(tensor.device)  # what else this process computes must not wait for the engines
        with torch.cuda.stream(stream):
            group.broadcast([tensor], options).wait()
        stream.synchronize()

    def close(self) -> None:
        """Leave the group. Whoever still waits for others to join, here or in an engine, fails at once."""
        self._store = None
        if self._group is not None and self.backend == "nccl":
            self._group.abort()  # ends a broadcast that the others take no part in
        self._group = None
