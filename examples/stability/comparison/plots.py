"""This module draws the comparison as one picture: every measure over training steps, with a mean line and thin lines
for the seeds."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from comparison.measures import FINISHED, Run
from fiberpo_megatron.telemetry.report.figures import PALETTE, STYLE
from fiberpo_megatron.telemetry.report.run_data import Series

PLOT_FILE = "curves.png"


@dataclass(frozen=True)
class Panel:
    """Describes one chart."""

    title: str
    kind: str
    """"train" or "eval" records."""
    metric: str
    log: bool = False
    percent: bool = False


PANELS = (
    Panel("held-out accuracy (%)", "eval", "accuracy", percent=True),
    Panel("accuracy of the rollouts (%)", "train", "accuracy", percent=True),
    Panel("entropy (nats)", "train", "entropy"),
    Panel("gradient norm before clipping, mean", "train", "gradient_norm", log=True),
    Panel("importance ratio, mean", "train", "ratio/mean"),
    Panel("importance ratio, 99th percentile", "train", "ratio/p99", log=True),
    Panel("importance ratio, largest", "train", "ratio/max", log=True),
    Panel("gradient norm before clipping, largest", "train", "gradient_norm_max", log=True),
)
COLUMNS = 4
COLOURS = 64
"""Number of colours of the picture."""


def write_plots(runs: Sequence[Run], title: str, folder: Path) -> Path:
    """Write curves.png into `folder`; return its path."""
    names = list(dict.fromkeys(run.objective for run in runs))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    rows = -(-len(PANELS) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * COLUMNS, 2.7 * rows + 0.5), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, COLUMNS).flat, PANELS, strict=True):
            _draw(axes, panel, runs, colours)
        handles = [matplotlib.lines.Line2D([], [], color=colours[name], linewidth=2, label=name) for name in names]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(names), fontsize=10)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, color="#4b5563")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
    folder.mkdir(parents=True, exist_ok=True)
    few_colours = Image.open(picture).convert("RGB").quantize(COLOURS)  # a quarter of the bytes
    few_colours.save(folder / PLOT_FILE, optimize=True)
    return folder / PLOT_FILE


def mean_line(series: Sequence[Series]) -> Series:
    """Return the mean over seeds, at the steps where every seed has a finite value: a mean over fewer seeds would
    jump."""
    known = [
        dict(zip(s.steps[np.isfinite(s.values)].tolist(), s.values[np.isfinite(s.values)].tolist(), strict=True))
        for s in series
    ]
    steps = sorted(set.intersection(*(set(values) for values in known)))
    means = [float(np.mean([values[step] for values in known])) for step in steps]
    return Series(np.array(steps, np.int64), np.array(means, np.float64))


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run], colours: dict[str, str]) -> None:
    scale = 100.0 if panel.percent else 1.0
    drawn = []
    for name, colour in colours.items():
        found = [(run, run.series(panel.kind, panel.metric)) for run in runs if run.objective == name]
        present = [(run, series) for run, series in found if series is not None and series.finite.size]
        for run, series in present:
            axes.plot(series.steps, series.values * scale, color=colour, linewidth=0.7, alpha=0.45)
            drawn.append(series.finite * scale)
            if run.outcome.text != FINISHED:  # the run ends here, not the plot
                axes.plot(series.steps[-1], series.finite[-1] * scale, "x", color=colour, markersize=6)
        if present:
            mean = mean_line([series for _, series in present])
            markers = "o" if panel.kind == "eval" else ""
            axes.plot(mean.steps, mean.values * scale, color=colour, linewidth=2.0, marker=markers, markersize=3.5)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel("training steps done")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.margins(x=0.02)
    if panel.log and drawn and np.concatenate(drawn).min() > 0:
        _log_axis(axes, np.concatenate(drawn))


def _log_axis(axes: Axes, values: np.ndarray) -> None:
    """Make the axis logarithmic, with plain numbers as labels."""
    low, high = values.min() / 1.15, values.max() * 1.15
    axes.set_ylim(low, high)
    axes.set_yscale("log")
    subs = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0) if high / low < 10 else (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
