"""This module lets the training ranks of a publication keep step with each other, with small messages between hosts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fiberpo_megatron.weight_sync.base import Deadline


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
        self._publication = 0
        self._timeout = timedelta(seconds=timeout_s)

    @contextmanager
    def step(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Leave the block when every rank has done its part of `what`.

        A rank whose part failed raises its own error, all others RankFailed with that rank's number. Raises
        TimeoutError that names the ranks which did not arrive before the deadline.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, TimeoutError):  # ranks that are late would be waited for once more
                self._signal()
                self._failed(True, what, deadline)
            raise
        failed = self._failed(False, what, deadline)
        if failed:
            listed = ", ".join(map(str, failed))
            raise RankFailed(f"{what}: it failed on rank {listed}, whose own message says why")

    def check(self, what: str) -> None:
        """Raise RankFailed when another rank has failed since this publication began. Call it in long waits."""
        if self._store is not None and self._store.check([self._key]):
            raise RankFailed(f"{what}: another rank failed, and its own message says why")

    def begin(self) -> None:
        """Begin another publication, for `check`."""
        self._publication += 1
        if self.size > 1 and self._store is None:
            self._store = dist.PrefixStore("fiberpo-weights", dist.distributed_c10d._get_default_store())

    @property
    def _key(self) -> str:
        return f"failed-{self._publication}"

    def _signal(self) -> None:
        if self._store is not None:
            self._store.set(self._key, str(self.rank))

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
            dist.monitored_barrier(self._group, timedelta(seconds=deadline.left()), wait_all_ranks=True)
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
