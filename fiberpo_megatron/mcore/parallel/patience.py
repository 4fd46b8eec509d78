"""Ranks wait for work that takes long, such as a step's generation, without a collective that would time out.

A collective bounds every wait by `run.distributed_timeout_s`, which has to be short to find ranks that hang. So before
they agree about the work, the ranks meet in the rendezvous store: each reports that it has finished, and asks now and
then whether all have. Ranks that die meanwhile are found by their heartbeats (`heartbeat.py`).
"""

import os
import time
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from fiberpo_megatron.rendezvous import start_key

_LONGEST_PAUSE_S = 2.0
_PAUSE_SHARE = 0.01
"""A rank asks again after this share of the time that it has waited, so that it loses at most 1 % to the waiting."""
_STORE_S = 60.0
_NAMED = 8
_starts = count()


class Patience:
    """This is the count, in the rendezvous store, of how often each rank has finished its work."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size, self._rounds = rank, size, 0
        self._prefix = start_key(f"patience{next(_starts)}")
        self._store: Any = None

    def wait(self, where: str, deadline_s: float) -> None:
        """Return when every rank has called this; every rank calls it equally often.

        Raises TimeoutError after `deadline_s` (s), which names `where` and the ranks that have not come.
        """
        if self._size == 1:
            return
        if self._store is None:  # the process groups' own connection may be in use by another thread
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            timeout = timedelta(seconds=_STORE_S)
            self._store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
        self._rounds += 1
        self._store.set(self._key(self._rank), str(self._rounds))
        wanted, began = self._rounds * self._size, time.monotonic()
        finished = self._store.add(f"{self._prefix}/finished", 1)
        while finished < wanted:
            waited = time.monotonic() - began
            if waited >= deadline_s:
                missing = [rank for rank in range(self._size) if self._done(rank) < self._rounds]
                more = f" and {len(missing) - _NAMED} others" if len(missing) > _NAMED else ""
                raise TimeoutError(
                    f"{where}: rank {', '.join(map(str, missing[:_NAMED]))}{more} did not finish within {deadline_s:g} "
                    f"s, for which rank {self._rank} has waited"
                )
            time.sleep(min(max(waited * _PAUSE_SHARE, 1e-3), _LONGEST_PAUSE_S, deadline_s - waited))
            finished = self._store.add(f"{self._prefix}/finished", 0)

    def _done(self, rank: int) -> int:
        key = self._key(rank)
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"
