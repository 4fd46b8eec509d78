"""This module writes the charts of a run as files: SVG figures for a paper's appendix, and their numbers as CSV."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from fiberpo_megatron import durable
from fiberpo_megatron.printable import printable
from fiberpo_megatron.telemetry.panels import Curve, Panel, panel_sections
from fiberpo_megatron.telemetry.report.panels import draw, series_of
from fiberpo_megatron.telemetry.report.run_data import RunData, Series, load_run

STEPS = "steps_done"


def write_figures(run_folder: Path | str, target: Path | str) -> list[Path]:
    """Write <target>/<section>-<panel>.svg and .csv for every chart of a run, and return the paths.

    Curves in the figures differ in their line style and areas in their pattern, so that they can be distinguished
    without colours; an SVG's curves are thinned out with all peaks kept. A CSV has every value: a column of steps done,
    and one for each metric, empty where there is none. Raises ValueError for a folder that is no run's or that holds
    no metrics, and OSError for a file that cannot be written.
    """
    data, folder = load_run(Path(run_folder)), Path(target)
    sections = panel_sections(data.names_by_kind())
    if not sections:
        raise ValueError(f"{run_folder} holds no metrics yet; write the figures when the run has done a step")
    with durable.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for section in sections:
        for panel in section.panels:
            stem = folder / f"{section.key}-{panel.key}"
            written += [_write_svg(stem, draw(panel, data, hatched=True)), _write_csv(stem, panel, data)]
    return written


def _write_svg(stem: Path, svg: str) -> Path:
    path = stem.with_name(f"{stem.name}.svg")
    with durable.replaced(path, text=True) as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n')
        # a size in inches, for programs that set pages; a browser's page gives its own
        file.write(svg.replace("<svg ", '<svg width="4.9in" height="2.55in" ', 1) + "\n")
    return path


def _write_csv(stem: Path, panel: Panel, data: RunData) -> Path:
    columns = _columns(panel, data)
    steps = np.unique(np.concatenate([series.steps for _, series in columns]))
    values = []
    for _, series in columns:
        known = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        values.append([_text(known.get(step)) for step in steps.tolist()])
    path = stem.with_name(f"{stem.name}.csv")
    with durable.replaced(path, text=True) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([STEPS, *(printable(name) for name, _ in columns)])
        rows.writerows(zip(steps.tolist(), *values, strict=True))
    return path


def _columns(panel: Panel, data: RunData) -> list[tuple[str, Series]]:
    found = []
    for curve in panel.curves:
        found.append((_name(curve), series_of(curve, data)))
        band = data.series(curve.kind, curve.band) if curve.band is not None else None
        found += [(f"{curve.kind}: {curve.band}", band)] if band is not None else []
    return found


def _name(curve: Curve) -> str:
    less = f" - {curve.minus}" if curve.minus is not None else ""
    return f"{curve.kind}: {curve.metric}{less}"


def _text(value: Any) -> str:
    return "" if value is None or np.isnan(value) else repr(value)
