"""This module keeps the records of one kind as columns of numbers, which grow by blocks of rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST_ROWS = 256
LARGEST_STEP = np.iinfo(np.int64).max


class Table:
    """Holds every numeric metric of one kind of record over the steps, in ascending order and each step once.

    Values are kept as float32: seven digits are more than a chart shows, and a run of 100,000 steps with 130 metrics
    takes 52 MB instead of 104 MB. A value that is missing, no number or not finite is nan.
    """

    def __init__(self) -> None:
        self._steps = np.zeros(FIRST_ROWS, np.int64)
        self._columns: dict[str, NDArray[np.float32]] = {}
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def steps(self) -> NDArray[np.int64]:
        """Return [rows] the steps as they stand in the records, ascending."""
        return self._steps[: self._rows]

    @property
    def names(self) -> list[str]:
        """Return the metrics in the order in which they first appeared."""
        return list(self._columns)

    def column(self, name: str) -> NDArray[np.float32] | None:
        """Return [rows] a metric's values, nan where a record had none; None for an unknown metric."""
        found = self._columns.get(name)
        return None if found is None else found[: self._rows]

    def row(self, step: int) -> dict[str, float] | None:
        """Return the finite values of one step, or None if no record has the step."""
        place = int(np.searchsorted(self.steps, step))
        if place == self._rows or self._steps[place] != step:
            return None
        values = ((name, float(column[place])) for name, column in self._columns.items())
        return {name: value for name, value in values if np.isfinite(value)}

    def extend(self, names: Sequence[str], steps: Sequence[int], rows: Sequence[Sequence[Any]]) -> None:
        """Add rows of values of the same metrics. A row of a step that is known takes the place of the earlier one: a
        run that was resumed writes it again."""
        ascending = all(a < b for a, b in zip(steps, steps[1:]))
        last = self._steps[self._rows - 1] if self._rows else -1
        values = _numbers(rows)
        if ascending and steps[0] > last:
            self._append(names, steps, values)
            return
        for step, row in zip(steps, values):
            if not self._rows or step > self._steps[self._rows - 1]:
                self._append(names, [step], row[None])
            else:
                self._put(names, step, row)

    def _append(self, names: Sequence[str], steps: Sequence[int], values: NDArray[np.float32]) -> None:
        start, end = self._rows, self._rows + len(steps)
        self._reserve(end)
        for place, name in enumerate(names):
            self._column(name)[start:end] = values[:, place]
        self._steps[start:end] = steps
        self._rows = end

    def _put(self, names: Sequence[str], step: int, row: NDArray[np.float32]) -> None:
        """Insert a row between others, or replace the one of the same step."""
        place = int(np.searchsorted(self.steps, step))
        if self._steps[place] != step:
            self._reserve(self._rows + 1)
            arrays: list[NDArray[Any]] = [self._steps, *self._columns.values()]
            for values in arrays:
                values[place + 1 : self._rows + 1] = values[place : self._rows].copy()
            self._steps[place] = step
            self._rows += 1
        for column in self._columns.values():
            column[place] = np.nan
        for name, value in zip(names, row):
            self._column(name)[place] = value

    def _column(self, name: str) -> NDArray[np.float32]:
        if name not in self._columns:
            self._columns[name] = np.full(len(self._steps), np.nan, np.float32)
        return self._columns[name]

    def _reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all. Arrays that were handed out stay as they are."""
        capacity = len(self._steps)
        if rows <= capacity:
            return
        grown = max(rows, capacity + capacity // 2)
        self._steps = np.concatenate([self._steps, np.zeros(grown - capacity, np.int64)])
        for name, column in self._columns.items():
            self._columns[name] = np.concatenate([column, np.full(grown - capacity, np.nan, np.float32)])


NUMERIC = {float, int, bool, type(None)}


def numeric(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are numbers, or null where a number was not finite: often all of them, as they are."""
    if NUMERIC.issuperset(map(type, values.values())):
        return values
    return {name: value for name, value in values.items() if type(value) in NUMERIC}


def _numbers(rows: Sequence[Sequence[Any]]) -> NDArray[np.float32]:
    """Return [rows, metrics] with nan for what is not finite; null is nan."""
    try:
        values = np.array(rows, np.float64)
    except OverflowError:  # an integer of hundreds of digits
        values = np.array([[_number(value) for value in row] for row in rows], np.float64)
    values[~(np.abs(values) <= np.finfo(np.float32).max)] = np.nan
    return values.astype(np.float32)


def _number(value: Any) -> float:
    try:
        return np.nan if value is None else float(value)
    except OverflowError:
        return np.nan
