"""This module lets the training ranks of a publication keep step with each other, with small messages between hosts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fiberpo_megatron.engines.errors import EngineError, EngineTimeout, EngineUnreachable
from fiberpo_megatron.rendezvous import start_key
from fiberpo_megatron.weight_sync.base import Deadline

TIDY_S = 10.0
"""Seconds after a deadline within which the ranks still meet, so that one that has waited for an engine until the
deadline can say so to the others."""
_made = count()
"""Every rank makes its `Ranks` in the same order, so that a number tells one from the next in the store."""
_LOST = {kind.__name__: kind for kind in (EngineUnreachable, EngineTimeout)}
"""Errors about an engine without which a run can go on; every rank raises them, whichever rank has seen it."""


class RankFailed(RuntimeError):
    """This is raised on a rank whose own work was fine, because the work of another rank failed."""


class Ranks:
    """These are the training ranks, which meet in a gloo group of their own. With one rank nothing is sent.

    Every rank constructs one and makes the same calls in the same order.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._group: Any = None
        self._store: Any = None
        self._number, self._publication = next(_made), 0
        self._timeout = timedelta(seconds=timeout_s)

    @contextmanager
    def step(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Leave the block when every rank has done its part of `what`.

        A rank whose part failed raises its own error, all others that of `failure`. Raises TimeoutError that names the
        ranks which did not arrive within TIDY_S after the deadline.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, TimeoutError):  # ranks that are late would be waited for once more
                self._signal(error)
                try:
                    self._failed(True, what, deadline)
                except Exception as late:  # the first error is the one to raise
                    error.add_note(f"Not every rank knows of it: {type(late).__name__}: {late}")
            raise
        failed = self._failed(False, what, deadline)
        if failed:
            listed = ", ".join(map(str, failed))
            raise self.failure(what) or RankFailed(f"{what}: it failed on rank {listed}, whose own message says why")

    def failure(self, what: str) -> RankFailed | EngineError | None:
        """Return the error of the rank that failed first since this publication began. Ask for it in long waits.

        It is RankFailed with that rank's number; EngineUnreachable or EngineTimeout where the rank has lost an engine.
        """
        if self._store is None or not self._store.check([self._key]):
            return None
        said = json.loads(self._store.get(self._key))
        if said["lost"] is None:
            return RankFailed(f"{what}: it failed on rank {said['rank']}, whose own message says why")
        kind, url, seen, fix, log = said["lost"]
        return _LOST[kind](url, f"{seen} (seen by rank {said['rank']})", fix, None if log is None else Path(log))

    def begin(self) -> None:
        """Begin another publication, for `failure`."""
        self._publication += 1
        if self.size > 1 and self._store is None:
            prefix = start_key(f"weights-{self._number}")
            self._store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())

    @property
    def _key(self) -> str:
        return f"failed-{self._publication}"

    def _signal(self, error: BaseException) -> None:
        """Leave a failure for the other ranks to see, unless one was left already."""
        if self._store is None:
            return
        lost = None
        if isinstance(error, EngineError) and type(error).__name__ in _LOST:
            log = None if error.log is None else str(error.log)
            lost = [type(error).__name__, error.url, error.what, error.fix, log]
        self._store.compare_set(self._key, "", json.dumps({"rank": self.rank, "lost": lost}))

    def gather(self, value: object, what: str, deadline: Deadline) -> list[Any]:
        """Return every rank's JSON value, in rank order."""
        if self.size == 1:
            return [value]
        self._arrive(what, deadline)
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._group)
        longest = int(max(size.item() for size in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self._group)
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(found, sizes, strict=True)]

    def _failed(self, failed: bool, what: str, deadline: Deadline) -> list[int]:
        """Return the ranks that failed."""
        if self.size == 1:
            return [0] if failed else []
        self._arrive(what, deadline)
        flags = torch.zeros(self.size, dtype=torch.int32)
        flags[self.rank] = failed
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return [int(rank) for rank in flags.nonzero()]

    def _arrive(self, what: str, deadline: Deadline) -> None:
        """Wait for all ranks; the collective after it then needs no deadline of its own."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        try:
            dist.monitored_barrier(self._group, timedelta(seconds=deadline.left() + TIDY_S), wait_all_ranks=True)
        except RuntimeError as error:
            raise TimeoutError(
                f"{what}: not every rank arrived within weight_sync.timeout_s ({error}); see the log of the rank that "
                "is missing, or raise weight_sync.timeout_s"
            ) from error

    def close(self) -> None:
        """Leave the group. A second call does nothing."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
