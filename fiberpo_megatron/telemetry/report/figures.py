"""This module draws charts as inline SVG: lines and stacked areas over the steps of a run."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from fiberpo_megatron.printable import printable
from fiberpo_megatron.telemetry.report.run_data import Series

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b7280", "#8c564b")
"""Okabe and Ito's colours, which people with colour-blindness can distinguish, in an order for white paper."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#4b5563",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "report",
}
LONGEST_LABEL = 50
LARGEST = 1e30
"""Numbers beyond are not drawn: squares and sums of an axis would overflow."""
MOST_POINTS = 600
"""Points of a curve that are drawn: more than a column of the page has pixels, so that a report does not grow with the
number of steps. The smallest and largest value of every stretch are among them."""
SMOOTH_POINTS = 200
"""Points of a moving average that are drawn: about 13 in each window."""
WIDTH, HEIGHT = 4.9, 2.55
"""Inches; the page scales the picture to its column."""
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.4, 1.2)),
    (0, (6, 1.4, 1.4, 1.4)),
    (0, (9, 1.4)),
    (0, (3, 1, 1, 1)),
)
"""Line styles by number of the curve: curves can be distinguished in a greyscale print."""
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "||||", "oo", "**", "//..")
"""Patterns of stacked areas in figures for print."""
MARK = "#b5303f"
"""Colour of the steps at which an alarm was raised."""


@dataclass(frozen=True)
class Line:
    """Describes one curve."""

    label: str
    series: Series
    colour: str | None = None
    markers: bool = False
    """Points joined by a thin line: for a few measurements rather than a value every step."""
    band: Series | None = None
    """Half-width of a shaded band around the curve, at the same steps."""


def line_chart(
    lines: Sequence[Line], *, unit: str, log: bool = False, percent: bool = False, marks: Sequence[int] = ()
) -> str:
    """Return an SVG of several curves; noisy ones are drawn pale, with a moving average over them.

    `percent` shows shares times 100. `log` asks for a logarithmic axis, which is used when all values are positive.
    `marks` are steps at which a thin vertical line is drawn.
    """
    scale = 100.0 if percent else 1.0
    lines = [replace(line, label=label_of(line.label), series=_drawable(line.series)) for line in lines]
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas("%" if percent else unit)
        for number, line in enumerate(lines):
            _draw(axes, line, line.colour or PALETTE[number % len(PALETTE)], DASHES[number % len(DASHES)], scale)
        values = np.concatenate([line.series.finite for line in lines])
        if log and values.size and values.min() > 1 / LARGEST:
            _log_axis(axes, values.min() / 1.25, values.max() * 1.25)
        elif percent and values.size and values.min() >= 0:
            axes.set_ylim(bottom=0)
        _mark(axes, marks)
        _arrange(figure, axes, legend=len(lines) > 1 or lines[0].band is not None)
        return as_svg(figure)


def stacked_chart(
    parts: Sequence[tuple[str, Series, str | None]],
    *,
    unit: str,
    percent: bool = False,
    hatched: bool = False,
    marks: Sequence[int] = (),
) -> str:
    """Return an SVG of areas on top of each other: (label, series, colour). Missing values count as 0.

    The areas of a long run are moving averages, with a pale line at their sum in single steps, except for shares.
    `hatched` gives each area a pattern, for print without colours. `marks`: see `line_chart`.
    """
    parts = [(label_of(label), _drawable(series), colour) for label, series, colour in parts]
    steps = np.unique(np.concatenate([series.steps for _, series, _ in parts]))
    scale = 100.0 if percent else 1.0
    heights = [_aligned(series, steps) * scale for _, series, _ in parts]
    total, window = Series(steps, np.sum(heights, axis=0)), window_of(len(steps))
    if window > 1:
        heights = [moving_average(height, window) for height in heights]
        kept = _evenly(len(steps))
        steps, heights = steps[kept], [height[kept] for height in heights]
    colours = [colour or PALETTE[i % len(PALETTE)] for i, (_, _, colour) in enumerate(parts)]
    if len(steps) == 1:  # an area needs two points
        steps, heights = np.array([steps[0] - 0.5, steps[0] + 0.5]), [np.repeat(h, 2) for h in heights]
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas("%" if percent else unit)
        labels = [label for label, _, _ in parts]
        areas = axes.stackplot(steps, heights, labels=labels, colors=colours, linewidth=0.4, edgecolor="white")
        for number, area in enumerate(areas if hatched else ()):
            area.set_hatch(HATCHES[number % len(HATCHES)])
        if window > 1 and not percent:  # the peaks that the average hides
            peaks = _extremes(total.values)
            axes.plot(total.steps[peaks], total.values[peaks], color="#6b7280", linewidth=0.6, alpha=0.35)
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(0, 100 if percent else None)
        _mark(axes, marks)
        _arrange(figure, axes, legend=True)
        return as_svg(figure)


def label_of(text: str) -> str:
    """Return a text that a legend can show: short, on one line, without hidden characters. (matplotlib leaves out what
    begins with an underscore.)"""
    short = printable(text[:LONGEST_LABEL] + ("…" if len(text) > LONGEST_LABEL else ""))
    return f" {short}" if short.startswith("_") else short


def _drawable(series: Series) -> Series:
    """The series without values that an axis cannot show beside others."""
    with np.errstate(invalid="ignore"):
        return Series(series.steps, np.where(np.abs(series.values) <= LARGEST, series.values, np.nan))


def moving_average(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the [n] means over an odd `window` around each value; the window is cut off at the ends.

    Values that are nan are left out; the mean is nan where the window has no other value.
    """
    count = len(values)
    index = np.arange(count)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(index - window // 2, 0)
    end = np.minimum(index + window // 2 + 1, count)
    total = counts[end] - counts[first]
    return np.divide(sums[end] - sums[first], total, out=np.full(count, np.nan), where=total > 0)


def window_of(count: int) -> int:
    """Return the steps of the moving average: an odd number, about a fifteenth of the run."""
    return 2 * (count // 30) + 1


def _draw(axes: Axes, line: Line, colour: str, dashes: Any, scale: float) -> None:
    steps, values = line.series.steps, line.series.values * scale
    if line.markers or len(steps) < 3:
        shown = _extremes(values)
        size = 4 if len(shown) <= SMOOTH_POINTS // 2 else 1.5
        joined = dashes if size == 4 else "none"  # thousands of lines between points hide the points
        style: dict[str, Any] = {
            "color": colour,
            "linewidth": 1.0,
            "linestyle": joined,
            "markersize": size,
            "label": line.label,
        }
        axes.plot(steps[shown], values[shown], marker="o", zorder=3, **style)
        return
    window = window_of(len(steps))
    smooth = moving_average(values, window)
    if window > 1:
        shown = _extremes(values)
        axes.plot(steps[shown], values[shown], color=colour, linewidth=0.7, alpha=0.28)
    kept = _evenly(len(steps)) if window > 1 else _extremes(values)
    axes.plot(steps[kept], smooth[kept], color=colour, linewidth=1.6, linestyle=dashes, label=line.label)
    if line.band is not None:
        half = moving_average(_aligned(_drawable(line.band), steps) * scale, window)
        low, high = (smooth - half)[kept], (smooth + half)[kept]
        axes.fill_between(steps[kept], low, high, color=colour, alpha=0.12, linewidth=0)


def _evenly(count: int) -> NDArray[np.int64]:
    """At most SMOOTH_POINTS of `count` positions, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, SMOOTH_POINTS)).round().astype(np.int64))


def _extremes(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """At most about MOST_POINTS positions, with the smallest and largest value of every stretch: no peak is lost."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), MOST_POINTS // 2 + 1).astype(np.int64)
    low = np.where(np.isnan(values), np.inf, values)
    high = np.where(np.isnan(values), -np.inf, values)
    pairs = [(a + low[a:b].argmin(), a + high[a:b].argmax()) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return np.unique([0, *(at for pair in pairs for at in pair), len(values) - 1])


def _aligned(series: Series, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the [len(steps)] values of the series at `steps`, 0 where it has none."""
    known = dict(zip(series.steps.tolist(), np.nan_to_num(series.values).tolist(), strict=True))
    return np.array([known.get(step, 0.0) for step in steps.tolist()])


def _canvas(unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    axes.set_xlabel("steps done")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.margins(x=0.02)
    return figure, axes


def _log_axis(axes: Axes, low: float, high: float) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5 of each decade, or at whole decades."""
    axes.set_ylim(low, high)
    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark(axes: Axes, steps: Sequence[int]) -> None:
    """Draw a vertical line at each of the steps that the axis shows."""
    low, high = axes.get_xlim()
    for step in steps:
        if low <= step <= high:
            axes.axvline(step, color=MARK, linewidth=0.8, linestyle=(0, (2, 1.5)), alpha=0.8, zorder=4)


def _arrange(figure: Figure, axes: Axes, legend: bool) -> None:
    """Leave room around the plot, and put the legend above it, or to its right when it is long, so that it hides no
    data. (matplotlib's own layout draws every picture twice.)"""
    handles, labels = axes.get_legend_handles_labels()
    top, right = 0.965, 0.98
    if legend and (len(labels) > 4 or sum(len(label) + 5 for label in labels) > 62):
        right = 0.895 - 0.0125 * min(32, max(map(len, labels)))
        shown = [label if len(label) <= 32 else f"{label[:31]}…" for label in labels]
        axes.legend(handles[::-1], shown[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)
    elif legend:
        top = 0.89
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, borderaxespad=0.1, handlelength=1.8)
    figure.subplots_adjust(left=0.125, right=right, bottom=0.175, top=top)


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element without a size of its own: the page gives it one."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' d="(M[^"A-Za-z]*(?:L[^"A-Za-z]*){12,}z?\s*)"', lambda match: f' d="{_short(match[1])}"', text)
    text = re.sub(r"(?<=translate\()(-?[\d.]+) (-?[\d.]+)(?=\))", _rounded, text)
    text = re.sub(r"\n\s+", "\n", text)
    # Sizes come from the page; the view box keeps the proportions.
    head, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[1]):.2f} {float(match[2]):.2f}"


def _short(path: str) -> str:
    """Return a path of straight lines as steps of tenths of a point, in a third of the characters."""
    points = [
        tuple(round(10 * float(number)) for number in point.split())
        for point in re.split("[ML]", path.rstrip("z \n"))[1:]
    ]
    (x, y), parts = points[0], []
    for to_x, to_y in points[1:]:
        parts.append(f"{_tenths(to_x - x)}{' ' if to_y >= y else ''}{_tenths(to_y - y)}")
        x, y = to_x, to_y
    closed = "z" if path.rstrip().endswith("z") else ""
    return f"M{points[0][0] / 10:g} {points[0][1] / 10:g}l{' '.join(parts)}{closed}"


def _tenths(number: int) -> str:
    """Return a number of tenths, as short as SVG allows."""
    whole, rest = divmod(abs(number), 10)
    digits = f"{whole or ''}{f'.{rest}' if rest else ''}" or "0"
    return f"-{digits}" if number < 0 else digits
