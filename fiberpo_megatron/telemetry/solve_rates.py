"""This module writes how often each training prompt was solved to <run>/solve_rates.jsonl, a line for each group:

    {"step": 12, "environment": "math", "id": "math/train/17", "solved": 6, "samples": 8, "solve_rate": 0.75}

The report reads it for prompts that are always or never solved, and `chat` and `math` can filter a data set by it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.printable import json_line

SOLVE_RATES_FILE = "solve_rates.jsonl"


@dataclass(frozen=True)
class SolveRate:
    """Holds how often a prompt was solved, over all steps in which it was drawn."""

    environment: str
    id: str
    solved: int
    samples: int


def append_solve_rates(folder: Path, step: int, groups: Iterable[Mapping[str, Any]]) -> None:
    """Append a line for each group of a step: `environment`, `id`, `solved` and `samples` (not 0). Raises OSError."""
    rated = ({**group, "solve_rate": group["solved"] / group["samples"]} for group in groups)
    lines = [json_line({"step": step, **group}) + "\n" for group in rated]
    with (folder / SOLVE_RATES_FILE).open("a", encoding="utf-8") as file:
        file.writelines(lines)


def drop_solve_rates(folder: Path, first_step: int) -> None:
    """Remove the lines of the steps that a run from `first_step` on makes again, and an incomplete last line."""
    path = folder / SOLVE_RATES_FILE
    if not path.is_file():
        return
    with path.open("rb") as old, durable.replaced(path, text=True) as file:
        for line in old:
            record = _record(line)
            if record is not None and record["step"] < first_step:
                file.write(json_line(record) + "\n")


def read_solve_rates(folder: Path) -> list[SolveRate]:
    """Return every prompt's rate, in the order in which prompts were drawn first; lines that are none are skipped."""
    path = folder / SOLVE_RATES_FILE
    found: dict[tuple[str, str], tuple[int, int]] = {}
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                record = _record(line)
                if record is not None:
                    key = record["environment"], record["id"]
                    solved, samples = found.get(key, (0, 0))
                    found[key] = solved + record["solved"], samples + record["samples"]
    return [SolveRate(*key, *counts) for key, counts in found.items()]


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None for what is not one."""
    try:
        record = json.loads(line.decode(errors="replace"))
        numbers = [record[name] for name in ("step", "solved", "samples")]
        texts = [record[name] for name in ("environment", "id")]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    whole = all(type(number) is int and number >= 0 for number in numbers)
    return record if line.endswith(b"\n") and whole and all(isinstance(text, str) for text in texts) else None
