"""This module describes how long responses are, and how trajectories of such lengths fill packed rows.

Lengths follow a log-normal distribution that is cut at the limit: what would be longer ends there. Its mean is the
given one, its spread is an assumption. Everything is a pure function of the numbers (the seed is fixed).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import erf, exp, log, sqrt

import numpy as np

_SEED = 1
_SAMPLED_RANKS = 8
_SAMPLED_TRAJECTORIES = 128


@dataclass(frozen=True)
class Lengths:
    """These are the lengths of a run's trajectories in tokens."""

    prompt: float
    """Mean prompt."""
    response: float
    """Mean response."""
    limit: float
    """Longest response; it is cut there."""
    spread: float
    """Standard deviation of the logarithm of a response before it is cut."""

    @property
    def mean(self) -> float:
        """Return the mean trajectory, prompt included."""
        return self.prompt + self.response

    @property
    def context(self) -> float:
        """Return the mean length of the trajectory to which a token belongs (longer ones have more tokens)."""
        whole = self.prompt + responses(self, 512)
        return float((whole**2).sum() / whole.sum())


@lru_cache(maxsize=1024)
def responses(lengths: Lengths, count: int) -> np.ndarray:
    """Return `count` response lengths, the quantiles of the distribution in ascending order [count]."""
    if lengths.response >= lengths.limit:
        return np.full(count, float(lengths.limit))
    centre = _centre(lengths)
    at = (np.arange(count) + 0.5) / count
    quantiles = np.exp(centre + lengths.spread * _normal_quantile(at))
    found = np.clip(quantiles, 1.0, lengths.limit)
    found *= lengths.response / found.mean()
    found = np.minimum(found, lengths.limit)
    found.setflags(write=False)
    return found


def longest(lengths: Lengths, count: int) -> float:
    """Return the expected longest of `count` responses: the quantile that one of them exceeds with even odds."""
    if lengths.response >= lengths.limit:
        return float(lengths.limit)
    at = np.array([0.5 ** (1.0 / count)])
    return float(min(lengths.limit, np.exp(_centre(lengths) + lengths.spread * _normal_quantile(at))[0]))


@lru_cache(maxsize=1024)
def _centre(lengths: Lengths) -> float:
    """Return the mean of the logarithm at which the cut distribution has the given mean, found by bisection."""
    low, high = -20.0, log(lengths.limit) + 40.0 * lengths.spread
    for _ in range(100):
        middle = (low + high) / 2
        if _cut_mean(middle, lengths.spread, lengths.limit) < lengths.response:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _cut_mean(centre: float, spread: float, limit: float) -> float:
    """Return the mean of min(x, limit) of a log-normal x."""
    cut = (log(limit) - centre) / spread
    return exp(min(700.0, centre + spread**2 / 2)) * _normal(cut - spread) + limit * (1 - _normal(cut))


def _normal(x: float) -> float:
    return 0.5 * (1 + erf(x / sqrt(2)))


def _normal_quantile(at: np.ndarray) -> np.ndarray:
    """Return the normal distribution's quantiles, by interpolation in a table of its values."""
    return np.interp(at, _TABLE, _GRID)


_GRID = np.linspace(-6, 6, 2401)
_TABLE = np.array([_normal(float(x)) for x in _GRID])


@dataclass(frozen=True)
class Packing:
    """This is how the trajectories of an optimiser step fill the rows of one data-parallel rank."""

    rows: int
    """Rows of every rank; ranks with fewer get empty ones."""
    imbalance: float
    """Time of the slowest ranks over that of an even share, where ranks wait for each other."""


@lru_cache(maxsize=4096)
def pack(lengths: Lengths, trajectories: int, row_tokens: int, ranks: int, in_step: bool) -> Packing:
    """Pack `trajectories` of each of `ranks` data-parallel ranks into rows of `row_tokens`, the longest first.

    With experts (`in_step`) ranks meet in every row, because an expert-parallel exchange spans them, so that a row
    takes as long as its fullest copy; else they meet at the end of the step. A sample of ranks and trajectories
    stands for many.
    """
    count = min(trajectories, _SAMPLED_TRAJECTORIES)
    shown = max(1, min(ranks, _SAMPLED_RANKS))
    drawn = lengths.prompt + responses(lengths, max(1, count * shown))
    drawn = np.random.default_rng(_SEED).permutation(drawn).reshape(shown, -1)
    filled = [_first_fit(sorted(rank, reverse=True), max(row_tokens, int(drawn.max()) + 1)) for rank in drawn]
    rows = max(len(rank) for rank in filled)
    table = np.array([sorted(rank, reverse=True) + [0.0] * (rows - len(rank)) for rank in filled])
    even = table.sum() / shown
    slowest = table.max(axis=0).sum() if in_step else table.sum(axis=1).max()
    return Packing(max(1, round(rows * trajectories / count)), float(slowest / even))


def _first_fit(trajectories: list[float], row_tokens: int) -> list[float]:
    rows: list[float] = []
    for length in trajectories:
        for at, filled in enumerate(rows):
            if filled + length <= row_tokens:
                rows[at] = filled + length
                break
        else:
            rows.append(length)
    return rows
