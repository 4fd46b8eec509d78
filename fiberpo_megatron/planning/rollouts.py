"""This module simulates an engine and the trainer over several steps, from the schedule of tickets itself.

Ticket k is the k-th trajectory of the run; step s owns tickets [s n, (s + 1) n) of an engine that serves n of a step's
trajectories. Once the weights of version v are published, the tickets below (v + 1 + staleness) n may run, lower ones
first. A step's training begins when all its tickets have ended, and its weights are published when it ends. Staleness 0
is the synchronous loop. The simulated engine stands for the slowest: it serves the longest response of all.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from fiberpo_megatron.planning.decoding import Decoder
from fiberpo_megatron.planning.lengths import Lengths, longest, responses

_SEED = 2


@dataclass(frozen=True)
class Load:
    """This is what one engine has to do in a step."""

    lengths: Lengths
    trajectories: int
    """Trajectories of a step on this engine."""
    of_all: int
    """Trajectories of a step on all engines, among which the longest is found."""
    running: int
    """Requests that run together at most."""
    prompts: float
    """Prompts to read in a step on this engine; fewer than the trajectories where samples share them."""


@dataclass(frozen=True)
class Cycle:
    """This is a step in the steady state, in seconds."""

    step: float
    """From the end of one step's training to the end of the next one's."""
    busy: float
    """Time in which the engine reads prompts and decodes."""


@dataclass(frozen=True)
class Schedule:
    """This is how generation and training may overlap."""

    staleness: float
    """Steps by which tickets may run ahead of the published weights."""
    drain: bool
    """Whether a publication waits until all admitted trajectories have ended; else requests pause, and their contexts
    are read again afterwards."""
    parts: int = 1
    """Parts of a step that are trained one after another, each as soon as its trajectories have ended."""
    in_order: bool = True
    """Whether a part consists of certain tickets; else of those that end first."""


@lru_cache(maxsize=4096)
def alone(decoder: Decoder, load: Load) -> float:
    """Return the seconds in which an engine generates one step's trajectories with nothing else to do."""
    return _Queue(decoder, load, Schedule(0.0, True), 0.0, 0.0, 1).run().busy


@lru_cache(maxsize=1024)
def simulate(decoder: Decoder, load: Load, schedule: Schedule, train: float, publish: float) -> Cycle:
    """Return the steady cycle when training a step takes `train` seconds and a publication `publish`."""
    if schedule.staleness == 0:
        busy = alone(decoder, load)
        return Cycle(busy + train + publish, busy)
    # the state comes back after staleness + 1 steps: two such periods to reach it, two to measure
    return _Queue(decoder, load, schedule, train, publish, 4 * (ceil(schedule.staleness) + 1)).run()


def quick(decoder: Decoder, load: Load, schedule: Schedule, train: float, publish: float) -> Cycle:
    """Return the same from a closed form, for a search: the slowest of trainer, engine, and the loop through both.

    The loop admits a step's tickets `staleness` + 1 publications before it is trained, so that a trajectory's time,
    training and publication together take at least so many cycles.
    """
    busy, staleness = alone(decoder, load), schedule.staleness
    if staleness == 0:
        return Cycle(busy + train + publish, busy)
    if schedule.drain:
        step = max(busy, train) + publish
    else:
        # of the admitted tickets some have ended and wait for their step's others
        running = max(1, min(load.running, int(load.trajectories * max(1.0, (1 + staleness) / 2))))
        lengths = load.lengths
        rate = decoder.accepted * running / decoder.step(running, running * (lengths.prompt + lengths.response / 2))
        work = load.trajectories * lengths.response / rate + load.prompts * lengths.prompt * decoder.prompt_token
        loop = (busy + train + publish) / (1 + staleness) if schedule.in_order else 0.0
        step = max(train + publish, work + publish, loop)
    return Cycle(step, min(busy, step))


def _ticket_lengths(load: Load, step: int) -> np.ndarray:
    """Return the response lengths of one step on the engine, in ticket order; one of them is the longest of all."""
    found = np.array(responses(load.lengths, load.trajectories))
    found[-1] = max(found[-1], longest(load.lengths, load.of_all))
    return np.random.default_rng((_SEED, step)).permutation(found)


class _Queue:
    """This is the state of the simulation; between two events the running requests, and so the speed, are constant."""

    def __init__(
        self, decoder: Decoder, load: Load, schedule: Schedule, train: float, publish: float, steps: int
    ) -> None:
        self._decoder, self._load, self._schedule = decoder, load, schedule
        self._train, self._publish, self._steps = train, publish, steps
        self._parts = min(schedule.parts, load.trajectories)
        # the engine goes on to work for later steps than the last that is trained here
        beyond = ceil(schedule.staleness) if steps > 1 else 0
        self._lengths: list[float] = np.concatenate(
            [_ticket_lengths(load, step) for step in range(steps + beyond)]
        ).tolist()
        self._running: list[tuple[float, int]] = []  # (position on the clock of tokens at which it ends, ticket)
        self._ended = [False] * len(self._lengths)
        self._clock = self._tokens = self._busy = self._cached = 0.0
        self._begun = self._version = self._taken = self._count = self._first = 0
        self._training_ends: float | None = None

    def run(self) -> Cycle:
        """Run all steps and return the mean cycle of the second half of them."""
        ends: list[float] = []
        while len(ends) < self._steps:
            self._begin()
            if self._training_ends is not None and self._training_ends <= self._clock:
                last = self._taken % self._parts == 0
                if not last:
                    self._training_ends = None
                    continue
                if not self._schedule.drain or not self._running:
                    ends.append(self._training_ends)
                    again = 0.0 if self._schedule.drain else self._cached * self._decoder.prompt_token
                    self._clock += self._publish + again
                    self._version, self._training_ends = self._version + 1, None
                    continue
            elif self._training_ends is None and self._ready():
                self._taken += 1
                self._training_ends = self._clock + self._train / self._parts
                continue
            if self._running:
                self._decode()
            else:
                assert self._training_ends is not None, "nothing runs, nothing trains, and steps are left"
                self._clock = max(self._clock, self._training_ends)
        if self._steps == 1:
            return Cycle(ends[0], self._busy)
        half = self._steps // 2
        cycle = (ends[-1] - ends[half - 1]) / (self._steps - half)
        return Cycle(cycle, self._busy / self._steps)

    def _ready(self) -> bool:
        """Return whether the trajectories of the next part have ended."""
        needed = min(len(self._lengths), (self._taken + 1) * self._load.trajectories // self._parts)
        if not self._schedule.in_order:
            return self._count >= needed
        while self._first < len(self._ended) and self._ended[self._first]:
            self._first += 1
        return self._first >= needed

    def _begin(self) -> None:
        """Let admitted tickets run, the lowest first, as far as the engine has room."""
        each, prompt = self._load.trajectories, self._load.lengths.prompt
        limit = min(len(self._lengths), int((self._version + 1 + self._schedule.staleness) * each))
        before = self._begun
        while self._begun < limit and len(self._running) < self._load.running:
            heapq.heappush(self._running, (self._tokens + self._lengths[self._begun], self._begun))
            self._begun += 1
        new = self._begun - before
        reading = new * self._load.prompts / each * prompt * self._decoder.prompt_token
        self._clock, self._busy, self._cached = self._clock + reading, self._busy + reading, self._cached + new * prompt

    def _decode(self) -> None:
        """Decode until a response or the training ends."""
        count = len(self._running)
        ahead = self._running[0][0] - self._tokens
        speed = self._decoder.step(count, self._cached + count * ahead / 2) / self._decoder.accepted
        end = self._clock + ahead * speed
        if self._training_ends is not None and self._clock < self._training_ends < end:
            ahead, end = (self._training_ends - self._clock) / speed, self._training_ends
        self._busy += end - self._clock
        self._clock, self._tokens, self._cached = end, self._tokens + ahead, self._cached + count * ahead
        while self._running and self._running[0][0] <= self._tokens + 1e-6:
            _, ticket = heapq.heappop(self._running)
            self._cached -= self._load.lengths.prompt + self._lengths[ticket]
            self._ended[ticket], self._count = True, self._count + 1
