"""This module reads and writes `alarms.jsonl` of a run folder: one event a line, an alarm that is raised or cleared."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fiberpo_megatron import durable
from fiberpo_megatron.printable import json_line, printable
from fiberpo_megatron.telemetry.metrics import Kind, steps_done

ALARMS_FILE = "alarms.jsonl"
Severity = Literal["notice", "warning", "stop"]
"""A notice is worth a look, a warning wants an action, and `stop` has stopped the run."""


@dataclass(frozen=True)
class Alarm:
    """This is one event: a rule has raised an alarm, or a raised alarm has cleared."""

    step: int
    """Step of the record that made the event, numbered as in metrics.jsonl: steps of training from 0."""
    kind: Kind
    """Kind of that record: "train", or "eval" where `step` counts the steps done."""
    rule: str
    """Name of the rule in [telemetry.alarms], such as "entropy_collapse"."""
    state: Literal["raised", "cleared"]
    metric: str
    """Name of the metric that the rule looks at; of several partitions or ranks the one that stands out."""
    value: float | None
    """The metric's value as the rule saw it, often the median of some steps; None when it is not finite."""
    limit: float
    """The value beyond which the alarm is raised, in the unit of `value`."""
    since: int
    """First step of the records that raised the alarm."""
    message: str
    """One sentence for people: what was seen, with value and limit."""
    causes: tuple[str, ...]
    """Likely causes, the most likely first."""
    setting: str
    """Dotted name of the setting to try first, with the change to make: "optimizer.learning_rate: halve it"."""
    severity: Severity

    @property
    def done(self) -> int:
        """Return the number of steps done at the event, for an axis that training and evaluation share."""
        return steps_done(self.kind, self.step)

    def text(self) -> str:
        """Return the alarm for a console, in a line for each: what, why, and what to try."""
        if self.state == "cleared":
            return f"alarm {self.rule} cleared: {self.message}"
        head = f"ALARM {self.rule} ({self.severity}), since step {self.since}: {self.message}"
        return "\n".join([head, f"  likely causes: {'; '.join(self.causes)}", f"  try {self.setting}"])


def write_alarm(path: Path, alarm: Alarm) -> None:
    """Append an event to `path`, on the disk before this returns. Raises WriteFailed, an OSError."""
    with durable.explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json_line(asdict(alarm)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_alarms(run_folder: Path) -> list[Alarm]:
    """Return the events of a run in the order in which they happened; none without a file.

    Lines that are no events are left out: the last one of a run that was killed, and those of a later version.
    """
    path = run_folder / ALARMS_FILE
    if not path.is_file():
        return []
    found = (_alarm(line) for line in path.read_bytes().split(b"\n") if line.strip())
    return [alarm for alarm in found if alarm is not None]


def drop_alarms(run_folder: Path, first_step: int) -> None:
    """Remove the events of records that a run from step `first_step` on writes again. The file is replaced as a whole;
    without a file nothing happens."""
    path = run_folder / ALARMS_FILE
    if not path.is_file():
        return
    kept = [alarm for alarm in read_alarms(run_folder) if not _is_repeated(alarm, first_step)]
    with durable.replaced(path, text=True) as file:
        file.writelines(json_line(asdict(alarm)) + "\n" for alarm in kept)


def _is_repeated(alarm: Alarm, first_step: int) -> bool:
    """Return whether the record behind the event is written again (as in `sinks.drop_records`)."""
    evaluated_before = alarm.kind == "eval" and first_step > 0
    return alarm.step > first_step if evaluated_before else alarm.step >= first_step


def _alarm(line: bytes) -> Alarm | None:
    try:
        found: Any = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return _checked(found) if isinstance(found, Mapping) else None


def _checked(found: Mapping[str, Any]) -> Alarm | None:
    """Return the event of a JSON object; None when a field is missing or of another type."""
    texts = ("kind", "rule", "state", "metric", "message", "setting", "severity")
    causes, value = found.get("causes"), found.get("value")
    fine = (
        all(isinstance(found.get(name), str) for name in texts)
        and all(type(found.get(name)) is int for name in ("step", "since"))
        and _is_number(found.get("limit"))
        and (value is None or _is_number(value))
        and isinstance(causes, list)
        and all(isinstance(cause, str) for cause in causes)
        and found["kind"] in ("train", "eval", "sft")
        and found["state"] in ("raised", "cleared")
        and found["severity"] in ("notice", "warning", "stop")
    )
    if not fine:
        return None
    values = {field.name: found[field.name] for field in fields(Alarm)}
    values |= {name: printable(values[name]) for name in texts}
    return Alarm(**{**values, "causes": tuple(printable(cause) for cause in causes or ())})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
