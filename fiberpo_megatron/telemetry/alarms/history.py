"""This module holds what alarm rules look at: the first and the last records of a run."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan
from statistics import median
from typing import Any

from fiberpo_megatron.telemetry.metrics import Kind

FIRST = 10
"""Records of each kind that are kept from the start of the run: what the later ones are compared with."""
LAST = 64
"""Newest records of each kind that are kept."""
SMOOTH = 5
"""Records whose median stands for what a noisy metric is now."""


@dataclass(frozen=True)
class Evaluation:
    """Holds what an evaluation found beside what the training saw at that time."""

    done: int
    """Training steps done."""
    accuracy: float
    reward: float | None
    """Median training reward of the last SMOOTH steps; None before the first step."""


class History:
    """Keeps a bounded number of records, and answers what rules ask about them.

    It depends on the records alone, so that a resumed run that reads metrics.jsonl has the same history.
    """

    def __init__(self) -> None:
        self._first: dict[Kind, list[Mapping[str, Any]]] = {}
        self._last: dict[Kind, deque[Mapping[str, Any]]] = {}
        self._counts: dict[Kind, int] = {}
        self.best: Evaluation | None = None
        """The evaluation with the highest accuracy so far, the first of several."""
        self.evaluation: Evaluation | None = None
        """The newest evaluation."""

    def add(self, kind: Kind, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the next record. A value of None stands for one that is not finite, as in metrics.jsonl."""
        first = self._first.setdefault(kind, [])
        if len(first) < FIRST:
            first.append(metrics)
        self._last.setdefault(kind, deque(maxlen=LAST)).append(metrics)
        self._counts[kind] = self.count(kind) + 1
        accuracy = self.latest("accuracy", "eval") if kind == "eval" else None
        if accuracy is not None and isfinite(accuracy):
            self.evaluation = Evaluation(step, accuracy, self.now("reward/mean"))
            if self.best is None or accuracy > self.best.accuracy:
                self.best = self.evaluation

    def count(self, kind: Kind = "train") -> int:
        """Return how many records of a kind there have been."""
        return self._counts.get(kind, 0)

    def latest(self, name: str, kind: Kind = "train") -> float | None:
        """Return the newest record's value, nan where it is not finite; None when that record has no such metric."""
        records = self._last.get(kind)
        return _number(records[-1], name) if records else None

    def recent(self, name: str, count: int, kind: Kind = "train") -> list[float]:
        """Return the finite values in the last `count` records (at most LAST), oldest first."""
        records = self._last.get(kind, deque())
        chosen = (records[place] for place in range(max(0, len(records) - count), len(records)))  # no copy of all
        return _finite(_number(record, name) for record in chosen)

    def first(self, name: str, kind: Kind = "train") -> list[float]:
        """Return the finite values in the first FIRST records, oldest first."""
        return _finite(_number(record, name) for record in self._first.get(kind, []))

    def now(self, name: str, count: int = SMOOTH, kind: Kind = "train") -> float | None:
        """Return the median of the last `count` records; None until there are as many values."""
        values = self.recent(name, count, kind)
        return median(values) if len(values) >= count else None

    def start(self, name: str, kind: Kind = "train") -> float | None:
        """Return the median of the first FIRST records; None until they and SMOOTH later ones exist."""
        values = self.first(name, kind)
        return median(values) if len(values) >= FIRST and self.count(kind) >= FIRST + SMOOTH else None

    def names(self, begin: str, end: str = "", kind: Kind = "train") -> list[str]:
        """Return the names of the newest record that begin and end so, in order."""
        records = self._last.get(kind)
        return sorted(n for n in records[-1] if n.startswith(begin) and n.endswith(end)) if records else []


def _number(record: Mapping[str, Any], name: str) -> float | None:
    if name not in record:
        return None
    value = record[name]
    if isinstance(value, int | float) and isfinite(value):
        return float(value)
    return nan if value is None or isinstance(value, float) else None


def _finite(values: Any) -> list[float]:
    return [value for value in values if value is not None and isfinite(value)]
