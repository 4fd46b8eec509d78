"""This module reads what a run folder holds, for the report; every part may be missing.

A part that cannot be read, or is not what a run writes, is skipped, and `RunData.problems` names it: nothing in a run
folder keeps a report from being made.
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.telemetry.alarms import ALARMS_FILE, Alarm, read_alarms
from fiberpo_megatron.telemetry.engine_states import ENGINES_FILE, EngineStates, read_engine_states
from fiberpo_megatron.telemetry.metrics import Kind, steps_done
from fiberpo_megatron.telemetry.rollout_log import stored_rollouts
from fiberpo_megatron.telemetry.sinks import METRICS_FILE, read_records
from fiberpo_megatron.telemetry.solve_rates import SOLVE_RATES_FILE, SolveRate, read_solve_rates
from fiberpo_megatron.telemetry.step_trace import TRACES, StepTrace, read_trace
from fiberpo_megatron.telemetry.token_log import TOKENS, read_tokens

BESIDE = "evaluations"
"""Folder in which `fiberpo eval RUN` writes its own metrics."""
LONGEST_LINE = 2**24
"""Bytes of a line of rollouts; a longer one is skipped."""
MOST_SAMPLES = 50
"""Trajectories of a step that are read."""


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
    problems: tuple[str, ...] = ()
    """What the folder holds that could not be read, a sentence each."""
    alarms: tuple[Alarm, ...] = ()
    """Events of the alarms, in their order."""
    engines: EngineStates | None = None
    """The last known states of the engines."""
    tokens: tuple[tuple[int, list[dict[str, Any]]], ...] = ()
    """(step, recorded trajectories) of the first and the last recorded step."""
    solve_rates: tuple[SolveRate, ...] = ()
    """How often each training prompt was solved."""
    traces: tuple[StepTrace, ...] = ()
    """Of the steps whose traces are kept, the slowest one and the last one, or the one that is both."""
    _turned: dict[str, dict[str, "_Column"]] = field(default_factory=dict, init=False, repr=False)

    def names(self, kind: str) -> list[str]:
        """Return the numeric metrics of a kind, in the order of first appearance."""
        return [name for name, column in self._columns(kind).items() if name != "step" and column.numbers]

    def names_by_kind(self) -> dict[Kind, list[str]]:
        """Return the numeric metrics of every kind of record that this version knows."""
        kinds: tuple[Kind, ...] = get_args(Kind)
        return {kind: self.names(kind) for kind in kinds if kind in self.records}

    def series(self, kind: str, name: str) -> Series | None:
        """Return a metric over the run, or None if no record of the kind has a number for it."""
        column = self._columns(kind).get(name)
        if column is None or not column.numbers:
            return None
        return Series(np.array(column.steps, np.int64), np.array(column.values, np.float64))

    def _columns(self, kind: str) -> dict[str, "_Column"]:
        """Return the records of a kind by metric; they are turned once, because a run has hundreds of metrics."""
        if kind not in self._turned:
            found: dict[str, _Column] = {}
            for record in self.records.get(kind, []):
                done = steps_done(kind, record["step"])
                for name, value in record.items():
                    column = found.get(name) or found.setdefault(name, _Column())
                    column.steps.append(done)
                    column.values.append(number(value))
                    column.numbers = column.numbers or isinstance(value, (int, float))
            self._turned[kind] = found
        return self._turned[kind]


@dataclass
class _Column:
    """Holds a metric's values by step."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    numbers: bool = False
    """Whether any value is a number."""


def number(value: Any) -> float:
    """Return a number as a float: nan for anything else, infinity for an integer that is too large."""
    if not isinstance(value, (int, float)):
        return np.nan
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf


def table(values: Any, *keys: str) -> Mapping[str, Any]:
    """Return the table behind nested keys of a config or record; an empty one when there is none."""
    found = value_at(values, *keys)
    return found if isinstance(found, Mapping) else {}


def value_at(values: Any, *keys: str) -> Any:
    """Return the value behind nested keys of a config or record, or None."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def load_run(folder: Path, stages: int = 3) -> RunData:
    """Read a run folder. Raises ValueError if it is not one."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run folder; give the folder that holds {METRICS_FILE}")
    problems: list[str] = []
    config = _read_config(folder / "config.toml", problems)
    records = _read_metrics(folder / METRICS_FILE, problems)
    _add_evaluations(records, _read_metrics(folder / BESIDE / METRICS_FILE, problems).get("eval", []))
    rollouts = _read_rollouts(folder, stages, problems)
    alarms = _attempted(ALARMS_FILE, lambda: tuple(read_alarms(folder)), (), problems)
    engines = _attempted(ENGINES_FILE, lambda: read_engine_states(folder), None, problems)
    tokens = _attempted("tokens/", lambda: tuple(_read_tokens(folder, problems)), (), problems)
    rates = _attempted(SOLVE_RATES_FILE, lambda: tuple(read_solve_rates(folder)), (), problems)
    traces = _attempted("traces/", lambda: tuple(_read_traces(folder, records, problems)), (), problems)
    name = folder.resolve().name
    return RunData(name, config, records, rollouts, tuple(problems), alarms, engines, tokens, rates, traces)


def _attempted(name: str, read: Callable[[], Any], missing: Any, problems: list[str]) -> Any:
    """Return what `read` returns; `missing` where the file cannot be read, which becomes a problem."""
    try:
        return read()
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name} cannot be read ({_cause(error)})")
        return missing


def _read_tokens(folder: Path, problems: list[str]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    files, _ = TOKENS.stored(folder)
    for step, path in dict.fromkeys((files[0], files[-1])) if files else ():
        records, odd = read_tokens(path)
        problems += odd
        yield step, records


def _read_traces(folder: Path, records: Mapping[str, list[dict[str, Any]]], problems: list[str]) -> Iterator[StepTrace]:
    files, _ = TRACES.stored(folder)
    seconds = {record["step"]: number(record.get("seconds/total")) for record in records.get("train", [])}
    slowest = max(files, key=lambda file: np.nan_to_num(seconds.get(file[0], 0.0)), default=None)
    for _, path in dict.fromkeys((slowest, files[-1])) if slowest is not None else ():
        try:
            yield read_trace(path)
        except (OSError, ValueError) as error:  # it may have been deleted meanwhile
            problems.append(f"traces/{path.name} cannot be read ({_cause(error)})")


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if _is_file(path, problems) else {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({_cause(error)})")
        return {}


def _read_metrics(path: Path, problems: list[str]) -> dict[str, list[dict[str, Any]]]:
    odd: list[int] = []
    try:
        found = read_records(path, odd) if _is_file(path, problems) else []
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({_cause(error)})")
        found = []
    if odd:
        problems.append(f"{path.name}: {_lines(odd)} no records of metrics")
    records: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        records.setdefault(record["kind"], []).append(record)
    for kind in records:
        records[kind].sort(key=lambda record: int(record["step"]))
    return records


def _add_evaluations(records: dict[str, list[dict[str, Any]]], beside: list[dict[str, Any]]) -> None:
    """Add what `fiberpo eval RUN` measured to the run's own evaluations, which count where both have a metric."""
    if not beside:
        return
    of_step = {record["step"]: record for record in records.get("eval", [])}
    for record in beside:
        of_step[record["step"]] = {**record, **of_step.get(record["step"], {})}
    records["eval"] = [of_step[step] for step in sorted(of_step)]


def _read_rollouts(folder: Path, stages: int, problems: list[str]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Read the samples of the first step, the last step and evenly spaced steps between them."""
    try:
        files, odd = stored_rollouts(folder)
    except OSError as error:
        problems.append(f"rollouts/ cannot be read ({_cause(error)})")
        return []
    if odd:
        is_are = "name is" if len(odd) == 1 else "names are"
        problems.append(f"rollouts/: {len(odd)} {is_are} not that of a step's file, the first is {odd[0]!r}")
    if len(files) > stages:
        files = [files[round(i * (len(files) - 1) / (stages - 1))] for i in range(stages)]
    read = []
    for step, path in files:
        try:
            read.append((step, _read_samples(path, problems)))
        except OSError as error:  # it may have been deleted meanwhile
            problems.append(f"rollouts/{path.name} cannot be read ({_cause(error)})")
    return read


def _read_samples(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    odd = []
    with path.open("rb") as file:
        number = 0
        while len(samples) < MOST_SAMPLES and (line := file.readline(LONGEST_LINE)):
            number += 1
            sample = _sample(line)
            if sample is not None:
                samples.append(sample)
            elif line.strip():
                odd.append(number)
            while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(LONGEST_LINE)
    if odd:
        problems.append(f"rollouts/{path.name}: {_lines(odd)} no trajectories")
    return samples


def _sample(line: bytes) -> dict[str, Any] | None:
    try:
        sample = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return sample if isinstance(sample, dict) else None


def _is_file(path: Path, problems: list[str]) -> bool:
    if path.exists() and not path.is_file():
        problems.append(f"{path.name} is not a file")
    return path.is_file()


def _lines(odd: list[int]) -> str:
    return f"line {odd[0]} is" if len(odd) == 1 else f"{len(odd)} lines, the first is line {odd[0]}, are"


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
