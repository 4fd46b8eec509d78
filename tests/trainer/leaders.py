"""Several leaders of data-parallel replicas as threads of one process."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fiberpo_megatron.types import RolloutBatch, join_batches
from tests.trainer.toy import SingleLayout

Result = TypeVar("Result")
DEADLINE_S = 60


class Meeting:
    """Where the ranks of one run exchange values; each call of a rank is matched with those of the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait(DEADLINE_S)
        found = list(self._values)
        self._barrier.wait(DEADLINE_S)
        return found


class Leader(SingleLayout):
    """One of the ranks; all of them lead a replica."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = self.data_rank = rank
        self.world_size = self.data_size = meeting.size
        self.is_logger = rank == 0

    def gather_json(self, value: Any, root_only: bool = False) -> list[Any]:
        found = self._meeting.exchange(self.rank, json.loads(json.dumps(value)))
        return found if not root_only or self.rank == 0 else []

    def share_text(self, text: str | None) -> str:
        shared = self._meeting.exchange(self.rank, text)[0]
        assert isinstance(shared, str)
        return shared

    def any_rank(self, flag: bool) -> bool:
        return any(self._meeting.exchange(self.rank, flag))

    def agree(self, error: str | None, where: str, reraise: bool = True) -> None:
        errors = [one for one in self._meeting.exchange(self.rank, error) if one is not None]
        if errors and reraise:
            raise RuntimeError(f"a rank failed while {where}: {errors[0]}")

    def gather_rollouts(self, share: RolloutBatch | None) -> RolloutBatch:
        assert share is not None
        return join_batches([one.without_held() for one in self._meeting.exchange(self.rank, share)])


def on_leaders(size: int, work: Callable[[SingleLayout], Result]) -> Sequence[Result]:
    """Return what `work` gives on each of so many ranks, which run at the same time."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as threads:
        running = [threads.submit(work, Leader(meeting, rank)) for rank in range(size)]
        return [one.result() for one in running]
