"""This module simulates an engine and the trainer over several steps, from the schedule of tickets itself.

Ticket k is the k-th trajectory of the run; step s owns tickets [s n, (s + 1) n) of an engine that serves n of a step's
trajectories. Once the weights of version v are published, the tickets below (v + 1 + staleness) n may run, lower ones
first. A step's training begins when all its tickets have ended, and its weights are published when it ends. Staleness 0
is the synchronous loop. The simulated engine stands for the slowest: it serves the longest response of all.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache

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
    """Time in which the engine decodes."""
    wait: float
    """Time in which the trainer waits for trajectories or for a publication."""


@lru_cache(maxsize=4096)
def alone(decoder: Decoder, load: Load) -> float:
    """Return the seconds in which an engine generates one step's trajectories with nothing else to do."""
    return _run(decoder, load, 0.0, True, 0.0, 0.0, 1).busy


@lru_cache(maxsize=1024)
def simulate(decoder: Decoder, load: Load, staleness: float, drain: bool, train: float, publish: float) -> Cycle:
    """Return the steady cycle when training a step takes `train` seconds and a publication `publish`.

    With `drain` a publication waits until all admitted trajectories have ended; else requests pause, and their contexts
    are read again afterwards.
    """
    if staleness == 0:
        busy = alone(decoder, load)
        return Cycle(busy + train + publish, busy, busy + publish)
    return _run(decoder, load, staleness, drain, train, publish, 4 + 3 * int(staleness + 1))


def quick(decoder: Decoder, load: Load, staleness: float, drain: bool, train: float, publish: float) -> Cycle:
    """Return the same from a closed form, for a search: the slowest of trainer, engine, and the loop through both.

    The loop admits a step's tickets `staleness` + 1 publications before it is trained, so that a trajectory's time,
    training and publication together take at least so many cycles.
    """
    busy = alone(decoder, load)
    if staleness == 0:
        return Cycle(busy + train + publish, busy, busy + publish)
    if drain:
        step = max(busy, train) + publish
    else:
        ahead = int(load.trajectories * (1 + staleness))
        running = max(1, min(load.running, ahead))
        lengths = load.lengths
        rate = decoder.accepted * running / decoder.step(running, running * (lengths.prompt + lengths.response / 2))
        work = load.trajectories * lengths.response / rate + load.prompts * lengths.prompt * decoder.prompt_token
        step = max(train + publish, work + publish, (busy + train + publish) / (1 + staleness))
    return Cycle(step, min(busy, step), step - train)


def _ticket_lengths(load: Load, step: int) -> np.ndarray:
    """Return the response lengths of one step on the engine, in ticket order; one of them is the longest of all."""
    found = np.array(responses(load.lengths, load.trajectories))
    found[-1] = max(found[-1], longest(load.lengths, load.of_all))
    return np.random.default_rng((_SEED, step)).permutation(found)


def _run(
    decoder: Decoder, load: Load, staleness: float, drain: bool, train: float, publish: float, steps: int
) -> Cycle:
    """Run `steps` steps event by event; between events the running requests and so the decoding speed are constant."""
    each = load.trajectories
    lengths = np.concatenate([_ticket_lengths(load, step) for step in range(steps)])
    prompt = load.lengths.prompt
    reading = load.prompts / each * prompt * decoder.prompt_token  # seconds per trajectory that begins
    running: list[tuple[float, int]] = []  # (position of the clock of tokens at which it ends, ticket)
    left = [each] * steps
    clock = tokens = busy = cached = 0.0
    begun = version = taken = 0
    training_ends: float | None = None
    ends: list[float] = []
    while len(ends) < steps:
        limit = min(len(lengths), int((version + 1 + staleness) * each))
        before = begun
        while begun < limit and len(running) < load.running:
            heapq.heappush(running, (tokens + lengths[begun], begun))
            begun += 1
        if begun > before:
            clock += (begun - before) * reading
            busy += (begun - before) * reading
            cached += (begun - before) * prompt
        if training_ends is not None and training_ends <= clock and (not drain or not running):
            ends.append(training_ends)
            clock += publish + (0.0 if drain else cached * decoder.prompt_token)
            version, training_ends = version + 1, None
            continue
        if training_ends is None and taken < steps and left[taken] == 0:
            training_ends, taken = clock + train, taken + 1
            continue
        if not running:
            assert training_ends is not None, "nothing runs, nothing trains, and steps are left"
            clock = max(clock, training_ends)
            continue
        ahead = running[0][0] - tokens
        speed = decoder.step(len(running), cached + len(running) * ahead / 2) / decoder.accepted
        if training_ends is not None and clock < training_ends < clock + ahead * speed:
            ahead = (training_ends - clock) / speed
        clock, busy, tokens = clock + ahead * speed, busy + ahead * speed, tokens + ahead
        cached += len(running) * ahead
        if training_ends is not None and training_ends <= clock + 1e-9:
            training_ends = min(training_ends, clock)
        while running and running[0][0] <= tokens + 1e-6:
            _, ticket = heapq.heappop(running)
            cached -= prompt + lengths[ticket]
            left[ticket // each] -= 1
    if steps == 1:
        return Cycle(ends[0], busy, busy)
    half = steps // 2
    cycle = (ends[-1] - ends[half - 1]) / (steps - half)
    return Cycle(cycle, busy / steps, max(0.0, cycle - train))
