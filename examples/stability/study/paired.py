"""This module compares two objectives by their differences on the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = -0.03
"""The lower end of the interval above which one objective is level with another."""
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
"""Student's t at 95 %, for 1, 2, ... degrees of freedom: both tails together leave out 10 %."""


@dataclass(frozen=True)
class Interval:
    """Holds a mean difference with its two-sided 90 % interval of Student's t."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """Return in one word how the first objective compares with the second."""
        if self.low > 0:
            return "better"
        if self.low > LEVEL:
            return "level"
        return "worse" if self.high < 0 else "open"


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the interval of the mean of first - second, pair by pair.

    Raises ValueError unless both have the same number of values, at least 2 and at most 16.
    """
    if len(first) != len(second) or not 2 <= len(first) <= len(T_95) + 1:
        raise ValueError(f"{len(first)} and {len(second)} values; pass as many of each, from 2 to {len(T_95) + 1}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    reach = T_95[count - 2] * statistics.stdev(differences) / count**0.5
    return Interval(mean, mean - reach, mean + reach, count)
