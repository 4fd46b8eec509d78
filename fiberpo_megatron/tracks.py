"""This module notes what a trajectory does, and when: its phases, and its requests to engines.

The generator and the sampler write tracks, `telemetry/step_trace.py` makes a trace of those of a step. All times are in
seconds since 1970, so that those of several leaders belong together as far as their clocks agree. The module needs the
standard library only, so that every part may import it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

Phase = Literal["sampling", "queued", "scoring", "environment"]
PHASES: tuple[Phase, ...] = ("sampling", "queued", "scoring", "environment")
"""What a trajectory may be doing, the strongest first: with a request at an engine it is sampling, whatever else goes
on. `queued`: it waits for a slot of the sampler, for the engines to be open again, or for a worker of its environment.
`scoring`: a teacher or a reference scores its tokens."""
IDLE = "idle"
"""The phase of a trajectory that does none of these: it waits for the other samples of its prompt, or for its turn in
the event loop."""
SHORTEST_S = 0.001
"""Shorter stretches are counted in the seconds of their phase and not kept; what they separate is joined."""
MOST = 100
"""Stretches that a track keeps, and requests: the first half and the last half of them, so that a trajectory of 1000
turns takes no more memory than one of 50."""

Item = TypeVar("Item")


class Stretch(NamedTuple):
    """This is a time that a trajectory spent in one phase."""

    phase: str
    begin: float
    end: float


class Request(NamedTuple):
    """This is one request to an engine: a segment of a response, or one that failed and was asked again."""

    engine: int
    begin: float
    end: float
    tokens: int
    """Tokens that it sampled."""
    versions: tuple[str, ...]
    """Versions of the weights that sampled them, in their order."""
    finish: str
    """How it ended: the engine's reason (stop, length, abort), or the name of the error."""


@dataclass
class Answer:
    """This is what a request brings; who makes the request fills it in."""

    tokens: int = 0
    versions: tuple[str, ...] = ()
    finish: str = ""


class _Ends(Generic[Item]):
    """It keeps the first and the last of many items."""

    def __init__(self) -> None:
        self.added = 0
        self._first: list[Item] = []
        self._last: deque[Item] = deque(maxlen=MOST // 2)

    def add(self, item: Item) -> None:
        self.added += 1
        (self._first if len(self._first) < MOST // 2 else self._last).append(item)

    @property
    def newest(self) -> Item | None:
        return next((part[-1] for part in (self._last, self._first) if part), None)

    def replace_newest(self, item: Item) -> None:
        (self._last or self._first)[-1] = item

    def kept(self, most: int) -> list[Item]:
        """At most `most` of those that were kept: the first and the last."""
        every = [*self._first, *self._last]
        return every if len(every) <= most else [*every[: most - most // 2], *every[len(every) - most // 2 :]]


class Track:
    """This is the life of one trajectory until its reward and its scores are there.

    name: that of its prompt. sample: which of the prompt's trajectories it is.

        track = Track("sums/17", 2)
        with track.phase("queued"):
            await a_slot()
        with track.request(engine=0) as answer:
            answer.tokens = len(await response())
        track.end()
    """

    def __init__(self, name: str = "", sample: int = 0, clock: Callable[[], float] = time.time) -> None:
        self.name, self.sample, self._clock = name, sample, clock
        self.began = self._since = clock()
        self.ended: float | None = None
        """When it ended; None while it has not, and when it was cancelled."""
        self.seconds: dict[str, float] = {}
        """Time in each phase; together they are its whole life."""
        self.tokens = 0
        """Tokens that its requests sampled."""
        self._open = dict.fromkeys(PHASES, 0)
        self._phase: str = IDLE
        self._stretches = _Ends[Stretch]()
        self._requests = _Ends[Request]()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Note that the trajectory is in a phase inside. Phases may overlap: the strongest counts (`PHASES`)."""
        self._change(phase, 1)
        try:
            yield
        finally:
            self._change(phase, -1)

    @contextmanager
    def request(self, engine: int) -> Iterator[Answer]:
        """Note a request to an engine, which ends with the block; an error is its result."""
        answer, began = Answer(), self._clock()
        with self.phase("sampling"):
            try:
                yield answer
            except BaseException as error:
                answer.finish = type(error).__name__
                raise
            finally:
                self.tokens += answer.tokens
                request = Request(engine, began, self._clock(), answer.tokens, answer.versions, answer.finish)
                self._requests.add(request)

    def end(self) -> None:
        """Note that the trajectory has ended."""
        self._close(self._clock(), IDLE)
        self.ended = self._since

    def facts(self, most: int = MOST) -> dict[str, Any]:
        """Return what is known, as JSON values, with at most `most` stretches and as many requests: the first and the
        last. Times are rounded to microseconds."""
        return {
            "name": self.name,
            "sample": self.sample,
            "began": round(self.began, 6),
            "ended": None if self.ended is None else round(self.ended, 6),
            "tokens": self.tokens,
            "requests": self._requests.added,
            "seconds": {phase: round(seconds, 6) for phase, seconds in self.seconds.items()},
            "stretches": [(phase, round(begin, 6), round(end, 6)) for phase, begin, end in self._stretches.kept(most)],
            "segments": [(r.engine, round(r.begin, 6), round(r.end, 6), *r[3:]) for r in self._requests.kept(most)],
        }

    def _change(self, phase: Phase, by: int) -> None:
        self._open[phase] += by
        found = next((one for one in PHASES if self._open[one]), IDLE)
        if found != self._phase:
            self._close(self._clock(), found)

    def _close(self, now: float, further: str) -> None:
        """End the running stretch, and begin one of the phase `further`."""
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        before = self._stretches.newest
        if before is not None and before.phase == self._phase and self._since - before.end < SHORTEST_S:
            self._stretches.replace_newest(before._replace(end=now))
        elif now - self._since >= SHORTEST_S:
            self._stretches.add(Stretch(self._phase, self._since, now))
        self._phase, self._since = further, now


class Timeline:
    """It has the tracks of the trajectories of steps that were not taken yet.

    A leader's event loop adds to it, and its main thread takes a step's tracks once they have all ended.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._steps: dict[int, list[Track]] = {}

    def begin(self, step: int | None, name: str, sample: int) -> Track:
        """Return the track of a trajectory that begins now; with step None (an evaluation's) it is not kept."""
        track = Track(name, sample, self._clock)
        if step is not None:
            self._steps.setdefault(step, []).append(track)
        return track

    def take(self, step: int) -> list[Track]:
        """Return the tracks of a step in the order in which they began, and forget them and those of earlier steps."""
        taken = self._steps.get(step, [])
        for number in [number for number in list(self._steps) if number <= step]:
            del self._steps[number]
        return taken
