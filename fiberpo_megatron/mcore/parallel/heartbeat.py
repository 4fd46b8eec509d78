"""Ranks watch each other's signs of life, so that a rank that hangs is named by another one.

A collective's timeout says that a rank is missing, but not which. A thread of every rank therefore writes a beat to the
rendezvous store, with what the rank is doing, and watches the next rank's beat. A stopped or frozen process, or a lost
machine, is reported within `run.heartbeat_timeout_s`. If a rank's threads live but its program hangs, the others'
collective runs into `run.distributed_timeout_s`, and the error then lists what every rank is doing.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

Phase = Callable[[], tuple[str, float]]
"""Returns what this rank is doing, and for how many seconds."""
Leave = Callable[[Exception], NoReturn]
"""Ends this process immediately with an error."""

_BEATS = 10
"""Beats in the time after which a rank counts as silent."""
_LONGEST_INTERVAL_S = 5.0
_GRACE_S = 10.0
"""Seconds for which a lost store may be the normal end of the run."""
_LOST_PEER = re.compile(r"gloo|NCCL|[Tt]imed out|[Tt]imeout|Connection (reset|closed)")


class RankSilent(RuntimeError):
    """Another rank, or the rendezvous store, has given no sign of life."""


@contextmanager
def heartbeat(rank: int, size: int, timeout_s: float, phase: Phase, leave: Leave) -> Iterator[None]:
    """Send beats and watch the neighbour while the body runs; with one rank, or a `timeout_s` of 0, nothing happens.

    A silent neighbour ends this process by `leave`, because its main thread may wait in a collective. An error of the
    body that comes from a lost peer is raised again with what all ranks are doing.
    """
    if size == 1 or not timeout_s:
        yield
        return
    beats = _Beats(rank, size, timeout_s, phase, leave)
    beats.start()
    try:
        yield
    except RuntimeError as error:
        if not _LOST_PEER.search(str(error)):
            raise
        raise RuntimeError(f"{error}\n{beats.everyone()}") from error
    finally:
        beats.stop()


class _Beats:
    """Holds the thread and its connection to the store, since the main thread's own connection may be blocked."""

    def __init__(self, rank: int, size: int, timeout_s: float, phase: Phase, leave: Leave) -> None:
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._phase, self._leave = phase, leave
        self._interval = min(timeout_s / _BEATS, _LONGEST_INTERVAL_S)
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._store: Any = None
        self._count = 0

    def start(self) -> None:
        """Write the first beat in the calling thread, so that a rank that is past this point cannot hang unnoticed."""
        self._store = self._connect()
        self._beat(self._store)
        self._thread.start()

    def stop(self) -> None:
        """Announce that the rank ends normally, so that the neighbour no longer expects it."""
        self._stopping.set()
        self._thread.join(timeout=self._interval + _GRACE_S)

    def everyone(self) -> str:
        """Return what each rank wrote last."""
        try:
            store = self._connect()
            beats = [(rank, self._read(store, rank)) for rank in range(self._size)]
        except RuntimeError as error:
            return f"the rendezvous store that knows what the ranks were doing is gone as well: {error}"
        now = time.time()
        described = [
            f"rank {rank} ({beat['host']}, pid {beat['pid']}): {beat['phase']} for {beat['seconds']:.0f} s, "
            f"said {now - beat['time']:.0f} s ago"
            for rank, beat in beats
            if beat is not None
        ]
        return "what the ranks were doing: " + "; ".join(described)

    def _connect(self) -> Any:
        host, port = self._address
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))

    def _run(self) -> None:
        try:
            self._watch(self._store)
            self._store.set(_key(self._rank), "")
        except RankSilent as silence:
            self._leave(silence)
        except RuntimeError as error:  # torch's network errors
            if not self._stopping.wait(_GRACE_S):
                host, port = self._address
                self._leave(
                    RankSilent(f"the rendezvous store at {host}:{port} is gone, its machine or process: {error}")
                )

    def _watch(self, store: Any) -> None:
        """Beat until the end. Silence is counted in this rank's own beats, so that a suspended job is not silent."""
        neighbour = (self._rank + 1) % self._size
        last, unchanged = self._read(store, neighbour), 0
        while not self._stopping.wait(self._interval):
            self._beat(store)
            seen = self._read(store, neighbour)
            unchanged = unchanged + 1 if seen == last and seen is not None else 0
            last = seen
            if unchanged * self._interval >= self._timeout_s and seen is not None:
                raise RankSilent(
                    f"rank {neighbour} ({seen['host']}, pid {seen['pid']}) has given no sign of life for "
                    f"{unchanged * self._interval:.0f} s (run.heartbeat_timeout_s = {self._timeout_s:g}): stopped, "
                    f"frozen, or its machine is gone; its phase was {seen['phase']!r}, for {seen['seconds']:.0f} s"
                )

    def _beat(self, store: Any) -> None:
        phase, seconds = self._phase()
        self._count += 1
        beat = {"count": self._count, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        store.set(_key(self._rank), json.dumps(beat | {"phase": phase, "seconds": seconds}))

    def _read(self, store: Any, rank: int) -> dict[str, Any] | None:
        """Return the last beat of a rank; None before the first and after the end."""
        if not store.check([_key(rank)]):
            return None
        text = store.get(_key(rank)).decode()
        return dict(json.loads(text)) if text else None


def _key(rank: int) -> str:
    return f"fiberpo/beat/{rank}"
