"""This module thins out curves so that a chart gets a few points a pixel, and no peak is lost."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Holds what is drawn of one curve."""

    steps: NDArray[np.int64]
    """[n] steps done, ascending."""
    values: Floats
    """[n] nan where a gap is."""


def extremes(steps: NDArray[np.int64], values: Floats, first: int, last: int, buckets: int) -> Points:
    """Return the least and the largest value of every bucket of steps, at the steps where they are, in their order.

    Args:
        steps: [rows] ascending.
        values: [rows], nan for what is missing.
        first: the first row that is wanted.
        last: the row after the last one that is wanted.
        buckets: at most so many buckets are made, each of a power of two of rows and at a multiple of its size, so that
            the points stay where they are while rows are added. Up to 2 * buckets rows are returned as they are.
    """
    if last - first <= 2 * buckets:
        return Points(steps[first:last], values[first:last])
    grid, rows = _grid(values, first, last, buckets)
    lowest = np.where(np.isnan(grid), np.inf, grid).argmin(1)
    highest = np.where(np.isnan(grid), -np.inf, grid).argmax(1)
    offsets = np.arange(len(grid)) * grid.shape[1] + rows
    ends = [first, last - 1]
    places = np.unique(np.concatenate([offsets + lowest, offsets + highest, ends]))
    places = places[(places >= first) & (places < last)]
    return Points(steps[places], values[places])


def means(steps: NDArray[np.int64], values: Floats, first: int, last: int, buckets: int) -> Points:
    """Return the mean of every bucket at its middle step; the arguments are those of `extremes`."""
    if last - first <= 2 * buckets:
        return Points(steps[first:last], values[first:last])
    grid, start = _grid(values, first, last, buckets)
    known = ~np.isnan(grid)
    counts = known.sum(1)
    sums = np.where(known, grid, 0.0).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = sums / counts
    begins = np.maximum(start + np.arange(len(grid)) * grid.shape[1], first)
    ends = np.minimum(start + (np.arange(len(grid)) + 1) * grid.shape[1], last) - 1
    return Points(steps[(begins + ends) // 2], found)


def smoothed(steps: NDArray[np.int64], values: Floats, first: int, last: int, buckets: int, window: int) -> Points:
    """Return the mean over `window` rows around each row, at every row or in the middle of each bucket.

    The window is cut at both ends of the run, and missing values do not count; nan where the whole window is missing.
    """
    half = max(0, window // 2)
    low, high = max(0, first - half), min(len(values), last + half)
    part = values[low:high]
    known = ~np.isnan(part)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, part, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    size = 1 if last - first <= 2 * buckets else _size(last - first, buckets)
    places = np.arange(first - first % size + size // 2, last, size)
    places = np.unique(np.concatenate([places[places >= first], [last - 1]])) if last > first else places
    begin = np.maximum(places - half, 0) - low
    end = np.minimum(places + half + 1, len(values)) - low
    end = np.minimum(end, len(part))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (sums[end] - sums[begin]) / (counts[end] - counts[begin])
    return Points(steps[places], found)


def _size(rows: int, buckets: int) -> int:
    """Return the least power of two with which `buckets` buckets hold `rows` rows."""
    size = 1
    while size * buckets < rows:
        size *= 2
    return size


def _grid(values: Floats, first: int, last: int, buckets: int) -> tuple[Floats, int]:
    """Return the rows as [buckets, size], filled with nan, and the row at which the first bucket begins."""
    size = _size(last - first, buckets)
    start = first - first % size
    count = -(-(last - start) // size)
    grid = np.full(count * size, np.nan)
    grid[first - start : last - start] = values[first:last]
    return grid.reshape(count, size), start
