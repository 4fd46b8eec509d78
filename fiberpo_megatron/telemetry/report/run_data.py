"""This module reads what a run folder holds, for the report; every part may be missing."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.telemetry.metrics import steps_done
from fiberpo_megatron.telemetry.sinks import METRICS_FILE, read_records


@dataclass(frozen=True)
class Series:
    """Holds one metric over a run."""

    steps: NDArray[np.int64]
    """[n] steps done at each record, ascending."""
    values: NDArray[np.float64]
    """[n] nan where the value was missing or not finite."""

    @property
    def finite(self) -> NDArray[np.float64]:
        """Return the values that are finite numbers."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class RunData:
    """Holds a run folder's content."""

    name: str
    config: dict[str, Any]
    """Resolved config; empty when there is no config.toml."""
    records: dict[str, list[dict[str, Any]]]
    """Metrics records of each kind, by step."""
    rollouts: list[tuple[int, list[dict[str, Any]]]]
    """(step, sample trajectories) of a few stages of the run, early to late."""

    def names(self, kind: str) -> list[str]:
        """Return the numeric metrics of a kind, in the order of first appearance."""
        found: dict[str, None] = {}
        for record in self.records.get(kind, []):
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    found[name] = None
        return list(found)

    def series(self, kind: str, name: str) -> Series | None:
        """Return a metric over the run, or None if no record of the kind has a number for it."""
        records = [record for record in self.records.get(kind, []) if name in record]
        if not any(isinstance(record[name], (int, float)) for record in records):
            return None
        steps = [steps_done(kind, record["step"]) for record in records]
        values = [r[name] if isinstance(r[name], (int, float)) else np.nan for r in records]
        return Series(np.array(steps, np.int64), np.array(values, np.float64))


def load_run(folder: Path, stages: int = 3) -> RunData:
    """Read a run folder. Raises ValueError if it is not one, or if a line of its metrics is broken."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run folder; give the folder that holds {METRICS_FILE}")
    config_path = folder / "config.toml"
    config = tomllib.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    records: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(folder / METRICS_FILE):
        records.setdefault(record["kind"], []).append(record)
    for kind in records:
        records[kind].sort(key=lambda record: int(record["step"]))
    return RunData(folder.resolve().name, config, records, _read_rollouts(folder / "rollouts", stages))


def _read_rollouts(folder: Path, stages: int) -> list[tuple[int, list[dict[str, Any]]]]:
    """Read the samples of the first step, the last step and evenly spaced steps between them."""
    paths = sorted(folder.glob("step_*.jsonl"))
    if len(paths) > stages:
        paths = [paths[round(i * (len(paths) - 1) / (stages - 1))] for i in range(stages)]
    read = []
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        read.append((int(path.stem.removeprefix("step_")), [json.loads(line) for line in lines]))
    return read
