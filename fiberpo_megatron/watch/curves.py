"""This module computes the points of one curve of a chart, as few as the chart can show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fiberpo_megatron.telemetry.metrics import steps_done
from fiberpo_megatron.watch.following import FollowedRun
from fiberpo_megatron.watch.sampling import Floats, Points, extremes, means, smoothed

MOSTLY = 0.5
"""A metric that fewer records have than this share is one of some steps only: its points are joined. Of other metrics a
missing value is a gap."""


@dataclass(frozen=True)
class Window:
    """Says what part of a curve is shown, and how."""

    begin: int | None = None
    """The first number of steps done; None begins with the run."""
    end: int | None = None
    """The last one; None ends with the run."""
    points: int = 600
    """About how many points the chart can show."""
    smooth: int = 0
    """Rows over which a moving mean is taken; 0 for none."""
    stack: bool = False
    """Whether the values are added up with those of other curves: each bucket then gets its mean."""


def curve(run: FollowedRun, wanted: Mapping[str, Any], window: Window) -> dict[str, Any] | None:
    """Return the points of a curve, or None if the run has no such metric.

    Args:
        run: the followed run.
        wanted: `kind` and `metric`, and optionally `minus` (a metric that is subtracted) and `band` (half a width).
        window: the part that is shown.

    Returns:
        {x, y, rows}: steps done, values with null for gaps, and the number of rows that they stand for; with a moving
        mean also {smooth_x, smooth_y}, with a band also {band_x, low, high}.
    """
    kind = wanted["kind"]
    with run.lock:
        table = run.tables.get(kind)
        column = None if table is None else table.column(wanted["metric"])
        if table is None or column is None:
            return None
        steps = table.steps + steps_done(kind, 0)
        values = column.astype(np.float64)
        other = _other(table, wanted, "minus")
        band = _other(table, wanted, "band")
    if other is not None:
        values = values - other
    if window.stack:
        values = np.nan_to_num(values)  # a phase that a step did not have took no time
    known = ~np.isnan(values)
    if known.mean() < MOSTLY:
        steps, values, band = steps[known], values[known], None if band is None else band[known]
    first = 0 if window.begin is None else max(0, int(np.searchsorted(steps, window.begin)) - 1)
    last = len(steps) if window.end is None else min(len(steps), int(np.searchsorted(steps, window.end, "right")) + 1)
    if first >= last:
        return {"x": [], "y": [], "rows": 0}
    buckets = max(1, window.points // 2)
    mean = smoothed(steps, values, first, last, buckets, window.smooth) if window.smooth > 1 else None
    if window.stack:
        found = mean if mean is not None else means(steps, values, first, last, buckets)
    else:
        found = extremes(steps, values, first, last, buckets)
    answer: dict[str, Any] = {"x": found.steps.tolist(), "y": _json(found.values), "rows": last - first}
    if window.stack:
        return answer
    if mean is not None:
        answer |= {"smooth_x": mean.steps.tolist(), "smooth_y": _json(mean.values)}
    if band is not None:
        answer |= _band(steps, values, band, first, last, buckets, window.smooth)
    return answer


def _band(
    steps: Any, values: Floats, band: Floats, first: int, last: int, buckets: int, smooth: int
) -> dict[str, list[float | None]]:
    edges: list[Points] = [
        smoothed(steps, values + sign * band, first, last, buckets, max(1, smooth)) for sign in (-1, 1)
    ]
    return {"band_x": edges[0].steps.tolist(), "low": _json(edges[0].values), "high": _json(edges[1].values)}


def _other(table: Any, wanted: Mapping[str, Any], name: str) -> Floats | None:
    metric = wanted.get(name)
    found = table.column(metric) if isinstance(metric, str) else None
    return None if found is None else found.astype(np.float64)


def _json(values: Floats) -> list[float | None]:
    """Return numbers of seven digits, which is what the columns hold, and null for nan."""
    return [float(f"{value:.7g}") if value == value else None for value in values.tolist()]
