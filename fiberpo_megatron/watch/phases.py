"""This module says how long each phase of some steps took, beside what a plan expects."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.telemetry.machine_panels import PHASES
from fiberpo_megatron.telemetry.metrics import steps_done
from fiberpo_megatron.telemetry.report.plan import TIMERS, compare
from fiberpo_megatron.telemetry.report.run_data import RunData
from fiberpo_megatron.watch.following import FollowedRun
from fiberpo_megatron.watch.table import Table

MOST_STEPS = 1000
"""Steps over which a mean is taken, at most."""
COLOURS = {
    **PHASES,
    "reference": "#56B4E9",
    "teacher": "#999933",
    "memory_turns": "#332288",
    "host": "#b7b7b7",
    "other": "#cfd4da",
}
UNPLANNED = {"evaluate": ("evaluate",)}
"""Phases that no plan has."""


def phases(run: FollowedRun, config: dict[str, Any], step: int | None, over: int) -> dict[str, Any] | None:
    """Return the seconds of each phase, measured, expected and planned, or None without records of training.

    Args:
        run: the followed run.
        config: its resolved config, for the causes of differences.
        step: steps done; None stands for the last ones.
        over: the mean is taken over so many steps up to this one, without the run's first.
    """
    with run.lock:
        table = run.tables.get("train")
        if table is None or not len(table):
            return None
        steps = table.steps
        wanted = int(steps[-1]) if step is None else step - steps_done("train", 0)
        last = min(len(steps), int(np.searchsorted(steps, wanted)) + 1)
        first = max(0, last - max(1, min(over, MOST_STEPS)))
        first += first == 0 and last > 1 and over > 1  # the run's start is in the time of its first step
        means = _means(table, first, last)
        ends = [steps_done("train", int(steps[at])) for at in (first, last - 1, 0, len(steps) - 1)]
        records = [table.row(int(one)) or {} for one in steps[first:last]] if "planned/seconds/total" in means else []
    rows = [_phase(name, timers, means) for name, timers in (*TIMERS.items(), *UNPLANNED.items())]
    total = means.get("seconds/total")
    known = sum(row["measured"] for row in rows)
    if total is not None:
        rows.append(_phase("other", (), means) | {"measured": max(0.0, total - known)})
    rows = [row for row in rows if row["measured"] or row["expected"] or row["planned"]]
    data = RunData("", config, {"train": [dict(record) for record in records]}, [])
    found = compare(data) if records else None
    return {
        "from": ends[0],
        "step": ends[1],
        "first": ends[2],
        "last": ends[3],
        "phases": rows,
        "total": {
            "measured": total,
            "expected": means.get("expected/seconds/total"),
            "planned": means.get("planned/seconds/total"),
        },
        "verdict": list(found.verdict) if found is not None else [],
        "slowest": {
            name.split("/")[1]: {"rank": means[name], "excess": means.get(name.replace("/rank", "/excess_seconds"))}
            for name in means
            if name.startswith("slowest/") and name.endswith("/rank")
        },
    }


def _phase(name: str, timers: tuple[str, ...], means: dict[str, float]) -> dict[str, Any]:
    parts = {timer: means[f"seconds/{timer}"] for timer in timers if means.get(f"seconds/{timer}")}
    if name == "train" and "seconds/gate" in means:
        parts = {"gate": means["seconds/gate"], "other than the gate": parts.get("train", 0.0) - means["seconds/gate"]}
    return {
        "name": name,
        "colour": COLOURS.get(name, COLOURS["other"]),
        "measured": sum(parts.values()),
        "parts": parts if len(parts) > 1 else {},
        "expected": means.get(f"expected/seconds/{name}"),
        "planned": means.get(f"planned/seconds/{name}"),
    }


def _means(table: Table, first: int, last: int) -> dict[str, float]:
    """Return the mean of every metric of times and ranks; a step that did not have a phase counts as 0 seconds."""
    found = {}
    for name in table.names:
        if not name.startswith(("seconds/", "expected/seconds/", "planned/seconds/", "slowest/")):
            continue
        column: NDArray[np.float32] | None = table.column(name)
        values = np.zeros(0) if column is None else column[first:last].astype(np.float64)
        if not np.isnan(values).all():
            last_rank = name.endswith("/rank")  # a rank is no number of which there are means
            found[name] = float(values[~np.isnan(values)][-1] if last_rank else np.nan_to_num(values).mean())
    return found
