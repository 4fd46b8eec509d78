"""This module draws the panels of a run from its data, as inline SVG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fiberpo_megatron.telemetry.panels import MOST_PANELS, Curve, Panel, panel_sections
from fiberpo_megatron.telemetry.report.figures import Line, line_chart, stacked_chart
from fiberpo_megatron.telemetry.report.run_data import RunData, Series
from fiberpo_megatron.telemetry.sinks import METRICS_FILE


@dataclass(frozen=True)
class Drawing:
    """Holds a panel with its picture."""

    panel: Panel
    svg: str


@dataclass(frozen=True)
class Section:
    """Holds drawings that belong together."""

    key: str
    title: str
    drawings: tuple[Drawing, ...]


def attempt(what: str, make: Callable[[], Any], problems: list[str]) -> Any:
    """Return what `make` returns. What it raises becomes a problem that the report shows, and the result is empty:
    whatever a run folder holds, the other parts of its report are made."""
    try:
        return make()
    except Exception as error:
        problems.append(f"{what} could not be made ({type(error).__name__}: {error})")
        return ""


def build_sections(data: RunData, problems: list[str]) -> list[Section]:
    """Return all sections that have at least one drawing. What cannot be drawn is appended to `problems`."""
    sections = []
    for section in panel_sections(data.names_by_kind()):
        drawings = []
        for panel in section.panels:
            marks = _alarms(panel, data)
            svg = attempt(f"the chart {panel.title!r}", lambda: draw(panel, data, marks), problems)  # noqa: B023
            if svg:
                drawings.append(Drawing(panel, svg))
        if section.cut:
            problems.append(
                f"the section {section.title!r} has more than {MOST_PANELS} charts; {METRICS_FILE} has all numbers"
            )
        if drawings:
            sections.append(Section(section.key, section.title, tuple(drawings)))
    return sections


def _alarms(panel: Panel, data: RunData) -> list[int]:
    """Return the steps at which an alarm about a metric of the panel was raised, on the axis of the panel."""
    metrics = {curve.metric for curve in panel.curves}
    return [alarm.done for alarm in data.alarms if alarm.state == "raised" and alarm.metric in metrics]


def draw(panel: Panel, data: RunData, marks: Sequence[int] = (), hatched: bool = False) -> str:
    """Return a panel as SVG, with lines at the steps `marks`; `hatched` gives areas patterns for print."""
    found = [(curve, series_of(curve, data)) for curve in panel.curves]
    if panel.form == "stack":
        parts = [(curve.label, series, curve.colour) for curve, series in found]
        return stacked_chart(parts, unit=panel.unit, percent=panel.percent, hatched=hatched, marks=marks)
    lines = []
    for curve, series in found:
        band = data.series(curve.kind, curve.band) if curve.band is not None else None
        lines.append(Line(curve.label, series, curve.colour, curve.markers, band))
    return line_chart(lines, unit=panel.unit, log=panel.log, percent=panel.percent, marks=marks)


def series_of(curve: Curve, data: RunData) -> Series:
    """Return the values of a curve over the run; a metric that was never logged gives an empty series."""
    series = data.series(curve.kind, curve.metric) or Series(np.empty(0, np.int64), np.empty(0))
    less = data.series(curve.kind, curve.minus) if curve.minus is not None else None
    if less is None:
        return series
    known = dict(zip(less.steps.tolist(), np.nan_to_num(less.values).tolist(), strict=True))
    return Series(series.steps, series.values - np.array([known.get(step, 0.0) for step in series.steps.tolist()]))
