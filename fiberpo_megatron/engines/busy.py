"""This module keeps the times in which engines have work, for figures of how long they were idle."""

import time
from collections.abc import Callable, Sequence

Interval = tuple[float, float]
"""Begin and end, in seconds since 1970."""


class BusyTimes:
    """These are the times in which each engine has at least one request of this process."""

    def __init__(self, engines: int, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._running = [0] * engines
        self._since = [0.0] * engines
        self._ended: list[list[Interval]] = [[] for _ in range(engines)]

    def began(self, engine: int) -> None:
        """Note that a request began."""
        if not self._running[engine]:
            self._since[engine] = self._clock()
        self._running[engine] += 1

    def ended(self, engine: int) -> None:
        """Note that a request ended."""
        self._running[engine] -= 1
        if not self._running[engine]:
            self._ended[engine].append((self._since[engine], self._clock()))

    def take(self) -> list[list[Interval]]:
        """Return the times of each engine since the last call, up to now."""
        now = self._clock()
        taken, self._ended = self._ended, [[] for _ in self._running]
        for engine, running in enumerate(self._running):
            if running:
                taken[engine].append((self._since[engine], now))
                self._since[engine] = now
        return taken


def idle_seconds(begin: float, end: float, busy: Sequence[Interval]) -> float:
    """Return how long nothing of `busy`, whose intervals may overlap, covers the time from `begin` to `end` (s)."""
    idle, at = 0.0, begin
    for start, stop in sorted(busy):
        idle += max(0.0, min(start, end) - at)
        at = max(at, stop)
    return idle + max(0.0, end - at)
