"""This module writes the comparison as tables: Markdown over seeds, CSV of the runs, JSON of both."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from comparison.measures import MEASURES, Result, Spread, outcomes, spread

SHARES = ("held_out_before", "held_out_final", "held_out_best", "accuracy_last")


def write_tables(results: Sequence[Result], settings: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write table.md, runs.csv and summary.json into `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, runs, summary = folder / "table.md", folder / "runs.csv", folder / "summary.json"
    markdown.write_text(markdown_table(results) + "\n", encoding="utf-8")
    with runs.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    content = {"settings": settings, "objectives": _summary(results), "runs": [asdict(result) for result in results]}
    summary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [markdown, runs, summary]


def markdown_table(results: Sequence[Result]) -> str:
    """Return one row per objective: mean ± standard deviation over seeds, accuracies in %."""
    rows = [["objective", "seeds", *MEASURES.values(), "outcome"]]
    for objective, group in by_objective(results).items():
        cells = [format_spread(name, spread([getattr(result, name) for result in group])) for name in MEASURES]
        rows.append([objective, str(len(group)), *cells, outcomes(group).replace("|", "\\|")])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def by_objective(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each objective, in the order of first appearance."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.objective, []).append(result)
    return groups


def format_spread(name: str, value: Spread | None) -> str:
    """Return `61.2 ± 1.3 %` or `4.31 ± 0.20`; without ± for one value."""
    if value is None:
        return "none"
    scale, unit = (100.0, " %") if name in SHARES else (1.0, "")
    numbers = [value.mean * scale, *([] if value.deviation is None else [value.deviation * scale])]
    return " ± ".join(f"{number:.1f}" if unit else _digits(number) for number in numbers) + unit


def _digits(number: float) -> str:
    """Return three significant digits, without an exponent for the usual sizes."""
    if 100 <= abs(number) < 1e6:
        return f"{number:.0f}"
    return f"{number:.3g}"


def _summary(results: Sequence[Result]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for objective, group in by_objective(results).items():
        spreads = {name: spread([getattr(result, name) for result in group]) for name in MEASURES}
        summary[objective] = {
            "seeds": [result.seed for result in group],
            "outcome": outcomes(group),
            **{name: None if value is None else asdict(value) for name, value in spreads.items()},
        }
    return summary
