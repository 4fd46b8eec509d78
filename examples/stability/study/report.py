"""This module chooses configurations from the runs of tuning, and writes the study's tables and its plot."""

from __future__ import annotations

import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from fiberpo_megatron.telemetry.report.figures import PALETTE, STYLE
from study.campaign import Row
from study.paired import Interval, paired_interval
from study.plan import CELLS, GRIDS, REFINEMENTS, text_of
from study.training import Cell

SCREENING, FINAL, COMPARISON, LEVELS, DEFAULTS = "screening", "final", "comparison", "levels", "defaults"
"""Stages: two rounds of tuning, the comparison on other seeds, and beside it FiberPO's choice with levels of prompt
groups and domains, and each objective's defaults."""
SUBJECT, PEERS = "fiberpo", ("grpo", "gspo")


def mean_scores(rows: Iterable[Row], stage: str) -> dict[str, dict[str, float]]:
    """Return by objective and options the mean final score over all of a stage's runs, the best first."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.stage == stage:
            found[row.objective][row.options].append(row.final)
    return {
        objective: dict(
            sorted(((o, statistics.fmean(values)) for o, values in by_options.items()), key=lambda pair: -pair[1])
        )
        for objective, by_options in found.items()
    }


def finalists(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return by objective the options of the second round: the best of the first one, and its refinements."""
    ranked = mean_scores(rows, SCREENING)
    return {name: [next(iter(ranked[name])), *map(text_of, REFINEMENTS[name])] for name in GRIDS}


def chosen(rows: Sequence[Row]) -> dict[str, str]:
    """Return by objective the options with the best mean over all cells of the second round."""
    ranked = mean_scores(rows, FINAL)
    return {objective: next(iter(ranked[objective])) for objective in GRIDS}


def chosen_by_cell(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Return by cell and objective the options with the best mean in that cell of the second round."""
    return {cell.name: chosen([row for row in rows if row.cell == cell.name]) for cell in CELLS}


def finals(rows: Iterable[Row], stage: str, cell: str, objective: str) -> list[float]:
    """Return the final scores of a stage's runs of one objective in one cell, in the order of their seeds."""
    found = [row for row in rows if (row.stage, row.cell, row.objective) == (stage, cell, objective)]
    return [row.final for row in sorted(found, key=lambda row: row.seed)]


def differences(rows: Sequence[Row], stage: str = COMPARISON) -> dict[tuple[str, str], Interval]:
    """Return by (cell, peer) the paired interval of FiberPO minus the peer."""
    return {
        (cell.name, peer): paired_interval(
            finals(rows, stage, cell.name, SUBJECT), finals(rows, stage, cell.name, peer)
        )
        for cell in CELLS
        for peer in PEERS
        if finals(rows, stage, cell.name, SUBJECT) and finals(rows, stage, cell.name, peer)
    }


def comparison_table(rows: Sequence[Row], stage: str = COMPARISON) -> str:
    """Return a Markdown table: a row a cell, the objectives' means, and FiberPO's paired intervals."""
    head = ["cell (task, optimiser steps, learning rate)", "start", SUBJECT, *PEERS]
    table = [[*head, *(f"{SUBJECT} - {peer}" for peer in PEERS)]]
    intervals = differences(rows, stage)
    for cell in CELLS:
        own = [row for row in rows if row.stage == stage and row.cell == cell.name]
        if not own:
            continue
        means = [f"{statistics.fmean(finals(own, stage, cell.name, name)):.3f}" for name in (SUBJECT, *PEERS)]
        found = [format_interval(intervals[cell.name, peer]) for peer in PEERS]
        table.append([_title(cell), f"{statistics.fmean(row.start for row in own):.3f}", *means, *found])
    return _markdown(table)


def levels_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of FiberPO's choice with gates on prompt groups and domains too, against all three."""
    peers = (SUBJECT, *PEERS)
    table = [["cell", "with levels", *(f"with levels - {peer}" for peer in peers)]]
    for cell in CELLS:
        own = finals(rows, LEVELS, cell.name, SUBJECT)
        if own:
            found = [paired_interval(own, finals(rows, COMPARISON, cell.name, peer)) for peer in peers]
            table.append([_title(cell), f"{statistics.fmean(own):.3f}", *map(format_interval, found)])
    return _markdown(table)


def tuning_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of every configuration that was tried, with its mean in both rounds."""
    first, second, best = mean_scores(rows, SCREENING), mean_scores(rows, FINAL), chosen(rows)
    table = [["objective", "options", "first round", "second round", ""]]
    for objective in GRIDS:
        for options in dict.fromkeys((*first[objective], *second[objective])):
            scores = [ranked[objective].get(options) for ranked in (first, second)]
            mark = "chosen" if best[objective] == options else ""
            cells = ["" if score is None else f"{score:.3f}" for score in scores]
            table.append([objective, f"`{options}`", *cells, mark])
    return _markdown(table)


def by_cell_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the second round's best mean in every cell, if each cell could have its own choice."""
    best, by_cell = chosen(rows), chosen_by_cell(rows)
    table = [["cell", *(f"{name}: one choice; best of the cell" for name in GRIDS)]]
    for cell in CELLS:
        own = [row for row in rows if row.cell == cell.name]
        scores = mean_scores(own, FINAL)
        pairs = [f"{scores[n][best[n]]:.3f}; {scores[n][by_cell[cell.name][n]]:.3f}" for n in GRIDS]
        table.append([_title(cell), *pairs])
    return _markdown(table)


def format_interval(interval: Interval) -> str:
    """Return `+0.012 (-0.004 to +0.028), level`."""
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f}), {interval.verdict}"


def _title(cell: Cell) -> str:
    return f"{cell.task}, {cell.optimiser_steps}, {cell.learning_rate:g}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def texts(rows: Sequence[Row]) -> Mapping[str, str]:
    """Return the tables that the runs allow, by the name of their file."""
    stages = {row.stage for row in rows}
    found: dict[str, str] = {}
    if FINAL in stages:
        found |= {"tuning.md": tuning_table(rows) + "\n", "by_cell.md": by_cell_table(rows) + "\n"}
    for stage in (COMPARISON, DEFAULTS):
        if stage in stages:
            found[f"{stage}.md"] = comparison_table(rows, stage) + "\n"
    if LEVELS in stages:
        found[f"{LEVELS}.md"] = levels_table(rows) + "\n"
    return found


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the tables, and a plot of the comparison, into `folder`; return their paths."""
    paths = []
    for name, text in texts(rows).items():
        paths.append(folder / name)
        paths[-1].write_text(text, encoding="utf-8")
    if differences(rows):
        paths.append(_plot(rows, folder / "comparison.png"))
    return paths


def _plot(rows: Sequence[Row], file: Path) -> Path:
    """Draw FiberPO minus each peer: a dot a seed, a line for the interval, one row a cell."""
    intervals = differences(rows)
    cells = [cell for cell in CELLS if (cell.name, PEERS[0]) in intervals]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 0.5 * len(cells) + 1.2), layout="constrained")
        axes = figure.subplots()
        for place, cell in enumerate(cells):
            own = finals(rows, COMPARISON, cell.name, SUBJECT)
            for number, peer in enumerate(PEERS):
                y, colour = -place - 0.25 * number, PALETTE[number % len(PALETTE)]
                other = finals(rows, COMPARISON, cell.name, peer)
                axes.plot([a - b for a, b in zip(own, other)], [y] * len(own), ".", color=colour, alpha=0.35)
                interval = intervals[cell.name, peer]
                label = f"fiberpo - {peer}" if place == 0 else None
                axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=2.5, label=label)
        axes.axvline(0.0, color="#9ca3af", linewidth=0.8)
        axes.set_yticks([-place - 0.125 for place in range(len(cells))], [_title(cell) for cell in cells])
        axes.set_xlabel("difference of the held-out score at the end (dots: seeds; lines: paired 90 % intervals)")
        axes.legend(fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.open(picture).convert("RGB").quantize(64).save(file, optimize=True)
    return file
