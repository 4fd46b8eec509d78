"""This module keeps the times in which engines have work, for figures of how long they were idle."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

Interval = tuple[float, float]
"""Begin and end, in seconds since 1970."""


class BusyTimes:
    """These are the times in which each engine has at least one request of this process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._running: Counter[int] = Counter()
        self._since: dict[int, float] = {}
        self._ended: dict[int, list[Interval]] = {}

    def began(self, engine: int) -> None:
        """Note that a request began."""
        if not self._running[engine]:
            self._since[engine] = self._clock()
        self._running[engine] += 1

    def ended(self, engine: int) -> None:
        """Note that a request ended."""
        self._running[engine] -= 1
        if not self._running[engine]:
            self._ended.setdefault(engine, []).append((self._since[engine], self._clock()))

    def take(self) -> dict[int, list[Interval]]:
        """Return the times of each engine, by its number, since the last call, up to now."""
        now = self._clock()
        taken, self._ended = self._ended, {}
        for engine, running in self._running.items():
            if running:
                taken.setdefault(engine, []).append((self._since[engine], now))
                self._since[engine] = now
        return taken


def idle_seconds(begin: float, end: float, busy: Sequence[Interval]) -> float:
    """Return how long nothing of `busy`, whose intervals may overlap, covers the time from `begin` to `end` (s)."""
    idle, at = 0.0, begin
    for start, stop in sorted(busy):
        idle += max(0.0, min(start, end) - at)
        at = max(at, stop)
    return idle + max(0.0, end - at)
