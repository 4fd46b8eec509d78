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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn

import torch.distributed as dist

from fiberpo_megatron.rendezvous import start_key

Phase = Callable[[], tuple[str, float]]
"""Returns what this rank is doing, and for how many seconds."""
Leave = Callable[[Exception], NoReturn]
"""Ends this process immediately with an error."""

_BEATS = 10
"""Beats in the time after which a rank counts as silent."""
_LONGEST_INTERVAL_S = 5.0
_REPORT_S = 30.0
"""Seconds for which a rank waits for what another one reads about all of them."""
_GRACE_S = 10.0
"""Seconds for which a lost store may be the normal end of the run."""
_FEW, _MANY = 8, 32
"""At most _FEW ranks of each kind that stands out are listed one by one, and all ranks of a run with at most _MANY."""
_starts = count()
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
    beats = _Beats(rank, size, timeout_s, phase, leave, _next_prefix())
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

    def __init__(self, rank: int, size: int, timeout_s: float, phase: Phase, leave: Leave, prefix: str) -> None:
        """`prefix` is that of the store's keys."""
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._phase, self._leave, self._prefix = phase, leave, prefix
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
        """Return what each rank wrote last. The first rank that asks reads it for all, because the ranks of a large run
        fail together."""
        try:
            store = self._connect()
            if store.add(self._report("reader"), 1) == 1:
                store.set(self._report("rank"), str(self._rank))
                text = self._read_all(store)
                store.set(self._report("text"), text)
                return text
            try:
                store.wait([self._report("text")], timedelta(seconds=_REPORT_S))
            except RuntimeError as error:
                if not store.check([self._report("rank")]):
                    raise
                reader = store.get(self._report("rank")).decode()
                return (
                    f"rank {reader}, which was to report what the ranks were doing, did not within {_REPORT_S:g} s "
                    f"({error}); see its log"
                )
            return str(store.get(self._report("text")).decode())
        except RuntimeError as error:
            return f"the rendezvous store that knows what the ranks were doing is gone as well: {error}"

    def _read_all(self, store: Any) -> str:
        keys = [self._key(rank) for rank in range(self._size)]
        if store.check(keys):
            beats = [_decoded(text) for text in store.multi_get(keys)]
        else:
            beats = [self._read(store, rank) for rank in range(self._size)]
        return "what the ranks were doing: " + "; ".join(_described(beats, self._interval))

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/beat/{rank}"

    def _report(self, part: str) -> str:
        return f"{self._prefix}/report/{part}"

    def _connect(self) -> Any:
        host, port = self._address
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))

    def _run(self) -> None:
        try:
            self._watch(self._store)
            self._store.set(self._key(self._rank), "")
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
        beat = {"count": self._count, "host": socket.gethostname(), "pid": os.getpid()}
        store.set(self._key(self._rank), json.dumps(beat | {"phase": phase, "seconds": seconds}))

    def _read(self, store: Any, rank: int) -> dict[str, Any] | None:
        """Return the last beat of a rank; None before the first and after the end."""
        return _decoded(store.get(self._key(rank))) if store.check([self._key(rank)]) else None


def _described(beats: Sequence[dict[str, Any] | None], interval: float) -> Iterator[str]:
    """Describe ranks by their last beats. In a large run only those that stand out are listed one by one: the ranks of
    rare phases, and those that have been silent for longest.

    How long ago a rank spoke is counted in beats, by which it is behind the rank that is furthest: the clocks of two
    machines differ, and may jump.
    """
    beaten = {rank: beat for rank, beat in enumerate(beats) if beat is not None}
    furthest = max((beat["count"] for beat in beaten.values()), default=0)
    ago = {rank: interval * (furthest - beat["count"]) for rank, beat in beaten.items()}
    in_phase: dict[str, list[int]] = {}
    for rank, beat in beaten.items():
        in_phase.setdefault(beat["phase"], []).append(rank)
    alone = set(sorted(beaten, key=lambda rank: -ago[rank])[:_FEW])
    for phase, ranks in in_phase.items():
        listed = [rank for rank in ranks if len(beaten) <= _MANY or len(ranks) <= _FEW or rank in alone]
        for rank in listed:
            beat = beaten[rank]
            yield (
                f"rank {rank} ({beat['host']}, pid {beat['pid']}): {phase} for {beat['seconds']:.0f} s, "
                f"said {ago[rank]:.0f} s ago"
            )
        if others := set(ranks) - set(listed):
            for_s, ago_s = [beaten[rank]["seconds"] for rank in others], [ago[rank] for rank in others]
            yield (
                f"{len(others)} other ranks: {phase} for {min(for_s):.0f} to {max(for_s):.0f} s, "
                f"said {min(ago_s):.0f} to {max(ago_s):.0f} s ago"
            )
    if silent := [rank for rank, beat in enumerate(beats) if beat is None]:
        more = f" and {len(silent) - _MANY} others" if len(silent) > _MANY else ""
        yield f"not started or ended: rank {', '.join(map(str, silent[:_MANY]))}{more}"


def _decoded(text: bytes) -> dict[str, Any] | None:
    return dict(json.loads(text)) if text else None


def _next_prefix() -> str:
    """Return the first part of all keys of one `heartbeat`, which is the same on every rank; a process may have several
    runs one after the other."""
    return start_key(f"heartbeat{next(_starts)}")
