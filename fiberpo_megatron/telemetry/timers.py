"""This module measures the seconds of each phase of a step."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fiberpo_megatron.spans import span

MOST_BLOCKS = 10_000
"""Blocks whose times are known one by one: the last ones of a step, whose gates may be called thousands of times."""
Block = tuple[str, float, float]
"""A phase, with begin and end of one of its blocks (s since 1970)."""


class PhaseTimers:
    """Adds up wall time per phase on this rank: `with timers("generate"): ...` times a block, `timers.read()` ends the
    step.

    Phases may be nested or repeated; each is summed separately. A profile that runs shows them by their names.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, waited: Callable[[], float] = lambda: 0.0
    ) -> None:
        """`waited` returns the seconds for which this rank has waited for other ranks so far."""
        self._clock, self._waited = clock, waited
        self._own: dict[str, float] = {}
        self.own: dict[str, float] = {}
        """Seconds by phase of the step that `read` has ended, without what this rank waited for others in them."""
        self._seconds: dict[str, float] = {}
        self._blocks: deque[Block] = deque(maxlen=MOST_BLOCKS)
        self._began = clock()
        self._running: tuple[tuple[str, float], ...] = ()
        self._idle = "start", self._began

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began, outer, waited = self._clock(), self._running, self._waited()
        self._running = (*outer, (phase, began))
        try:
            with span(phase):
                yield
        finally:
            ended = self._clock()
            self._running, self._idle = outer, (f"after {phase}", ended)
            self.add(phase, ended - began)
            self._blocks.append((phase, began, ended))
            own = ended - began - (self._waited() - waited)
            self._own[phase] = self._own.get(phase, 0.0) + max(0.0, own)

    def phase(self) -> tuple[str, float]:
        """Return the innermost running phase, or "after" the last one, and its seconds so far. Any thread may ask."""
        running = self._running
        name, began = running[-1] if running else self._idle
        return name, self._clock() - began

    def elapsed(self) -> float:
        """Return the seconds since the last `read`, or since the start."""
        return self._clock() - self._began

    def blocks(self, now: float) -> list[Block]:
        """Return the step so far, as a block "step" from the last `read` (or the start) to now, and the blocks in it
        that have ended, outer ones after those inside; `now` is the time in s since 1970."""
        shift = now - self._clock()  # of this moment: the two clocks drift apart in a long run
        step = "step", self._began, self._clock()
        return [(phase, begin + shift, end + shift) for phase, begin, end in (step, *self._blocks)]

    def add(self, phase: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Return {"seconds/<phase>": s, ..., "seconds/total": s since the last read or the start}, and begin a new
        step."""
        now = self._clock()
        metrics = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["seconds/total"] = now - self._began
        self._seconds, self._began = {}, now
        self._blocks.clear()
        self.own, self._own = self._own, {}
        return metrics
