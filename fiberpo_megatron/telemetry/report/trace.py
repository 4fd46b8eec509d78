"""This module shows where the time of a step went, and the trajectory that everybody waited for."""

from collections.abc import Iterator, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fiberpo_megatron.telemetry.machine_panels import PHASES as TRAINER_COLOURS
from fiberpo_megatron.telemetry.report.figures import MARK, STYLE, as_svg, label_of
from fiberpo_megatron.telemetry.report.text import html_table, shown
from fiberpo_megatron.telemetry.step_files import spread
from fiberpo_megatron.telemetry.step_trace import TRAINING, WAITING, StepTrace, TracedTrajectory
from fiberpo_megatron.tracks import IDLE

COLOURS = {
    "queued": "#c9ccd1",
    "sampling": "#0072B2",
    "environment": "#56B4E9",
    "scoring": "#CC79A7",
    IDLE: "#eceef1",
    WAITING: "#f3c9c4",
    TRAINING: "#D55E00",
}
"""Phases of a trajectory in their order, with their colours."""
WORDS = {
    "queued": "queued",
    "sampling": "sampling",
    "environment": "in its environment",
    "scoring": "being scored",
    IDLE: "idle",
    WAITING: "waiting for the slowest",
    TRAINING: "training",
}
OTHER_COLOUR = "#b7b7b7"
MOST_ROWS = 40
"""Trajectories that are drawn: of more, some that are spread evenly over the order in which they ended."""
LONGEST_LABEL = 32
WIDTH, LEFT, ROW, BAR = 11.0, 2.1, 0.15, 0.2
"""Inches: the picture's width, its labels at the left, the height of a row, and that of the bar of the step."""
ABOVE, BETWEEN, BELOW = 0.5, 0.4, 0.45
"""Inches: the legends of the bar and of the rows, and the axis below them."""
SMALLEST = 1e-3
"""Parts below this share of the whole are not named in sentences and legends."""


def trace_section(traces: Sequence[StepTrace]) -> str:
    """Return the time of some steps; nothing without any."""
    if not traces:
        return ""
    about = (
        "Each row is a trajectory, the one that ended last at the top. Until half of them had ended, the wait for them "
        "counts as what the unfinished ones did in it. Perfetto shows all trajectories and requests of the files in "
        "traces/."
    )
    return (
        f"<section>\n<h2>Time of a step</h2>\n<p class='about'>{about}</p>\n{''.join(map(_step, traces))}\n</section>"
    )


def _step(trace: StepTrace) -> str:
    verdict = "".join(f"<p>{shown(line)}</p>" for line in verdict_of(trace))
    return f"<h3>Step {trace.step}</h3>\n{verdict}\n<figure>{picture(trace)}</figure>\n{_table(trace)}\n"


def verdict_of(trace: StepTrace) -> Iterator[str]:
    """Yield sentences about a step: how long it took, and the trajectory that everybody waited for."""
    last = trace.last
    yield f"It took {trace.end - trace.begin:.3g} s, with {len(trace.trajectories)} trajectories."
    if last is None or last.ended is None:
        return
    engines = f"engine{'s' if len(last.engines) > 1 else ''} {', '.join(map(str, last.engines)) or 'unknown'}"
    did = ", ".join(f"{_words(phase)} {seconds:.3g} s" for phase, seconds in _notable(last.seconds))
    yield (
        f"All waited for {last.name}, sample {last.sample} ({engines}, {last.tokens} tokens in {last.requests} "
        f"request{'' if last.requests == 1 else 's'}), which ended {trace.tail_s:.3g} s after the median trajectory. "
        f"It took {last.ended - last.began:.3g} s: {did}."
    )


def picture(trace: StepTrace) -> str:
    """Return an SVG: a bar of where the step's time went, and under it trajectories by phase over time."""
    ended = [one for one in trace.trajectories if one.ended is not None]
    rows = [ended[place] for place in spread(MOST_ROWS, len(ended))]
    height = ABOVE + BAR + (BETWEEN + ROW * len(rows) + BELOW if rows else 0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        width = (WIDTH - LEFT - 0.2) / WIDTH
        bar = figure.add_axes((LEFT / WIDTH, 1 - (ABOVE + BAR) / height, width, BAR / height))
        _bar(bar, trace)
        if rows:  # the trajectories of a resumed step may all have been on disk
            _lives(figure.add_axes((LEFT / WIDTH, BELOW / height, width, ROW * len(rows) / height)), rows, trace)
        return as_svg(figure)


def _bar(axes: Axes, trace: StepTrace) -> None:
    at = 0.0
    for part, seconds in _notable(trace.parts()):
        label = label_of(f"{_words(part)} {seconds:.3g} s")
        axes.barh(0, seconds, left=at, color=colour_of(part), label=label, edgecolor="white", linewidth=0.4)
        at += seconds
    axes.set_yticks([0], ["time of the step"])
    axes.set_xlim(0, max(at, 1e-6))
    axes.tick_params(labelbottom=False, bottom=False)
    axes.grid(visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, borderaxespad=0.1, fontsize=7)


def _lives(axes: Axes, rows: Sequence[TracedTrajectory], trace: StepTrace) -> None:
    for row, one in enumerate(rows):
        pieces = [(begin - trace.begin, end - begin, colour_of(phase)) for phase, begin, end in one.stretches]
        spans, colours = [piece[:2] for piece in pieces], [piece[2] for piece in pieces]
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colours, linewidth=0)
    last = trace.last
    if last is not None and last.ended is not None:
        for at in (last.ended, last.ended - trace.tail_s):
            axes.axvline(at - trace.begin, color=MARK, linewidth=0.8, linestyle=(0, (2, 1.5)))
    labels = [label_of(_short(f"{one.name}, sample {one.sample}")) for one in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.get_yticklabels()[0].set(fontweight="bold", color=MARK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("s since the step began; dashed: the ends of the median trajectory and of the last one")
    drawn = {phase for one in rows for phase, _, _ in one.stretches}
    handles = [Patch(color=colour, label=WORDS[phase]) for phase, colour in COLOURS.items() if phase in drawn]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=7, borderaxespad=0.1, fontsize=7)


def _table(trace: StepTrace) -> str:
    """Return the parts of the step, and the seconds of a trajectory in each of its phases."""
    ended = [one for one in trace.trajectories if one.ended is not None]
    parts, last = trace.parts(), trace.last
    sums: dict[str, float] = {}
    for one in ended:
        for phase, seconds in one.seconds.items():
            sums[phase] = sums.get(phase, 0.0) + seconds
    rows = []
    for part, _ in _ordered({**dict(_notable(sums)), **dict(_notable(parts))}):
        mean = f"{sums[part] / len(ended):.3g}" if part in sums else ""
        of_last = f"{last.seconds[part]:.3g}" if last is not None and part in last.seconds else ""
        share = parts.get(part, 0.0) / (trace.end - trace.begin) if trace.end > trace.begin else 0.0
        cells = (f"{parts.get(part, 0.0):.3g}", f"{100 * share:.1f} %", mean, of_last)
        rows.append([shown(_words(part)), *(f"<span class='number'>{cell}</span>" for cell in cells)])
    return html_table(["part", "s of the step", "share", "s of the mean trajectory", "s of the last one"], rows)


def colour_of(part: str) -> str:
    """Return the colour of a phase of a trajectory, or of the trainer."""
    return COLOURS.get(part) or TRAINER_COLOURS.get(part, OTHER_COLOUR)


def _ordered(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """The parts in the order of a step: phases of trajectories, then those of the trainer, then what is left."""
    order = [*COLOURS, *TRAINER_COLOURS]
    known = [part for part in order if part in seconds]
    return [(part, seconds[part]) for part in (*known, *(part for part in seconds if part not in order))]


def _notable(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """The same without parts that are nearly nothing."""
    whole = sum(seconds.values())
    return [(part, each) for part, each in _ordered(seconds) if each > SMALLEST * whole]


def _words(part: str) -> str:
    return WORDS.get(part, part.replace("_", " "))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else f"…{text[1 - LONGEST_LABEL :]}"
