"""Seconds of each phase of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimers:
    """`with timers("generate"): ...` adds the time of the block to its phase; `timers.read()` ends the step.

    Phases may be nested or repeated; each adds up on its own. Measures wall time on this rank.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._began = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.add(phase, self._clock() - began)

    def add(self, phase: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """{"seconds/<phase>": s, ..., "seconds/total": s since the last read or the start}; starts anew."""
        now = self._clock()
        metrics = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["seconds/total"] = now - self._began
        self._seconds, self._began = {}, now
        return metrics
