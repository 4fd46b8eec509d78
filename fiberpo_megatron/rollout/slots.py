"""This module bounds the responses that are in flight."""

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count


class Slots:
    """These are the places for responses in flight. Requests of the lowest priority number come first, and among equals
    the one that asked first. A request that wants more places than there are waits until it is alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._numbers = count()
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        """A heap of (priority, when it asked, places, its turn)."""

    @asynccontextmanager
    async def taken(self, places: int, priority: int = 0) -> AsyncIterator[None]:
        first = not self._waiting or priority < self._waiting[0][0]
        if not first or not self._fits(places):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, next(self._numbers), places, turn))
            try:
                await turn  # bounded by the deadlines of the requests that hold the slots
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._taken -= places  # the slots were given just before the wait was cancelled
                self._wake()
                raise
        else:
            self._taken += places
        try:
            yield
        finally:
            self._taken -= places
            self._wake()

    def _fits(self, places: int) -> bool:
        return self._taken == 0 or self._taken + places <= self._total

    def _wake(self) -> None:
        while self._waiting and (self._waiting[0][3].done() or self._fits(self._waiting[0][2])):
            _, _, places, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._taken += places
                turn.set_result(None)
