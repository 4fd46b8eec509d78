"""This module computes the headline figures of a run from the columns that were read so far."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fiberpo_megatron.telemetry.metrics import describe, format_value, steps_done
from fiberpo_megatron.watch.following import FollowedRun
from fiberpo_megatron.watch.sampling import Floats

AVERAGED_STEPS = 10
"""Steps at the beginning and the end of a run over which figures are averaged, as in the report."""
RECENT_STEPS = 50
"""Steps over which the present speed is taken."""


@dataclass(frozen=True)
class Figure:
    """Holds one headline figure."""

    key: str
    label: str
    text: str
    """The value with its unit."""
    value: float | None = None
    """The value alone, in the unit of the metric; of a change the last one."""
    first: float | None = None
    """Of a change the first value."""


def figures(run: FollowedRun, planned_steps: int | None, running: bool) -> list[Figure]:
    """Return the figures of a run that its records allow."""
    with run.lock:
        columns = {kind: {name: table.column(name) for name in table.names} for kind, table in run.tables.items()}
        last = {kind: steps_done(kind, int(table.steps[-1])) for kind, table in run.tables.items() if len(table)}
    kind = "train" if "train" in columns or "sft" not in columns else "sft"

    def known(kind: str, name: str) -> Floats:
        found: Any = columns.get(kind, {}).get(name)
        return np.zeros(0) if found is None else found[~np.isnan(found)].astype(np.float64)

    found: list[Figure | None] = [
        _change("accuracy", "held-out accuracy, first and last", known("eval", "accuracy"), 1),
        _change("reward/mean", "mean reward, first and last steps", known(kind, "reward/mean"), AVERAGED_STEPS),
        _change("loss", "loss, first and last steps", known(kind, "loss"), AVERAGED_STEPS),
    ]
    times = known(kind, "seconds/total")
    if kind in last:
        text = f"{last[kind]:,} of {planned_steps:,}" if planned_steps else f"{last[kind]:,}"
        found.append(Figure("steps", "steps done", text, last[kind]))
    if times.size:
        step_s = float(np.median(times[-RECENT_STEPS:]))
        found.append(Figure("step", "time of a step, median of the last", duration(step_s), step_s))
        if running and planned_steps and planned_steps > last[kind]:
            rest = step_s * (planned_steps - last[kind])
            found.append(Figure("rest", "time to the last step, at this speed", duration(rest), rest))
        found.append(Figure("spent", "time in steps so far", duration(float(times.sum())), float(times.sum())))
    for name, label in (
        ("goodput", "goodput"),
        ("mfu/train", "MFU of training"),
        ("tokens_per_second", "throughput, median of the last"),
        ("rollout_diff/mean", "|rollout − trainer| log-prob, median"),
    ):
        values = known(kind, name)
        if values.size:
            value = float(values[-1] if name == "goodput" else np.median(values[-RECENT_STEPS:]))
            found.append(Figure(name, label, format_value(name, value), value))
    ratios = known(kind, "ratio/max")
    if ratios.size:
        found.append(
            Figure("ratio/max", "largest importance ratio", format_value("ratio/max", ratios.max()), ratios.max())
        )
    return [figure for figure in found if figure is not None]


def _change(name: str, label: str, values: Floats, over: int) -> Figure | None:
    if not values.size:
        return None
    count = max(1, min(over, values.size // 2))
    first, last = float(values[:count].mean()), float(values[-count:].mean())
    if values.size == 1:
        return Figure(name, label.partition(",")[0], format_value(name, last), last)
    unit = describe(name).unit
    start = format_value(name, first).removesuffix(" %" if unit == "share" else f" {unit}")
    return Figure(name, label, f"{start} → {format_value(name, last)}", last, first)


def duration(seconds: float) -> str:
    """Return a time span for people."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172800 else f"{seconds / 86400:.3g} days"
