"""Sinks take the records of a run: metrics.jsonl and the console always, TensorBoard, W&B and others as configured.

A record is one step's metrics of one kind. Sinks keep it whole: unknown names are written as well. A sink of
your own is one class in a file of yours:

    from fiberpo_megatron.telemetry.sinks import SinkContext

    class CsvSink:
        '''Writes the mean reward of every training step to a CSV file.'''

        def __init__(self, context: SinkContext, name: str = "rewards.csv") -> None:
            self.file = (context.run_folder / name).open("a")

        def write(self, step, kind, metrics):
            if kind == "train":
                print(step, metrics["reward/mean"], sep=",", file=self.file, flush=True)

        def close(self):
            self.file.close()

The config names it by its import path, and `options` are the arguments after `context`:

    [telemetry]
    sinks = [{use = "my_package.csv_sink:CsvSink", options = {name = "r.csv"}}]

An error in the constructor stops the run, because somebody can correct it at the start. An error in `write` or `close`
does not: a metrics service that is down must not end training. It is reported once on stderr, and the number of records
that were lost is reported at the end. metrics.jsonl has all records, and an error while writing it stops the run.
"""

import json
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fiberpo_megatron import durable, plugins
from fiberpo_megatron.plugins import Plugin, PluginError
from fiberpo_megatron.printable import json_line, printable
from fiberpo_megatron.settings import PluginConfig
from fiberpo_megatron.telemetry.alarms.record import Alarm
from fiberpo_megatron.telemetry.console import Console
from fiberpo_megatron.telemetry.metrics import Kind, steps_done
from fiberpo_megatron.telemetry.settings import TelemetryConfig

if TYPE_CHECKING:
    from fiberpo_megatron.config.schema import Config

METRICS_FILE = "metrics.jsonl"
LAST_STEP = 10**12
"""A record of a later step was not written by a run."""
SETTING = "telemetry.sinks"
Metrics = Mapping[str, float | int | str]
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the records of a run. Only one rank makes sinks and writes to them."""

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """Take one record. In "train" and "sft" records `step` is the step's index from 0, in "eval" records the number
        of steps done. Training waits until this returns."""
        ...

    def close(self) -> None:
        """Write out what is left. Called once, at the end of the run, also after an error."""
        ...

    # A sink that shows alarms has one more method: alarm(self, alarm: Alarm) -> None


@dataclass(frozen=True)
class SinkContext:
    """Holds what a run gives to each of its sinks."""

    run_folder: Path
    first_step: int
    """The step that runs next: 0 in a fresh run. A resumed run writes records from this step on again."""
    total_steps: int
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config as JSON values, for services that store it."""


class JsonlSink:
    """Writes `metrics.jsonl`: {"step": s, "kind": k, name: value, ...} a line, on the disk before `write` returns.

    Values that are not finite are written as null, so that every line is standard JSON.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with durable.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            durable.sync(path.parent)  # the name of a new file

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """Append one record."""
        record: dict[str, Any] = {"step": step, "kind": kind}
        record.update((name, _finite(value)) for name, value in metrics.items())
        with durable.explained(self._path):
            self._file.write(json_line(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with durable.explained(self._path):
            self._file.close()


def _finite(value: float | int | str) -> float | int | str | None:
    if isinstance(value, (str, int)):
        return value
    return float(value) if isfinite(value) else None


def read_records(path: Path, odd: list[int] | None = None) -> list[dict[str, Any]]:
    """Return the records of a metrics file: JSON objects with a text `kind` and a `step` from 0 to LAST_STEP.

    An incomplete last line is left out: the run was killed while writing it. The numbers of other lines that are no
    records are appended to `odd`. Without `odd` the first of them is a ValueError. Without a file there are no
    records. Raises OSError naming the file and the fix when it cannot be read.
    """
    if not path.is_file():
        return []
    with durable.explained(path):  # it may vanish at any time
        lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = parse_record(line)
        if record is not None:
            records.append(record)
        elif number == len(lines):  # complete lines end with a newline, so the split's last item is an incomplete one
            break
        elif odd is not None:
            odd.append(number)
        else:
            start = line[:120].decode(errors="replace")
            raise ValueError(f"{path}, line {number}: not a metrics record: {start!r}; remove the line")
    return records


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line of a metrics file, or None if the line is no record."""
    try:
        record = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if type(record.get("step")) is int and 0 <= record["step"] <= LAST_STEP else None


def drop_records(path: Path, first_step: int, kinds: Collection[Kind]) -> None:
    """Remove the records of `kinds` that a run from step `first_step` on writes again, and an incomplete last line.

    The evaluation of the weights that it starts from is kept, unless it starts at 0. Lines that are no records are
    removed with a warning. The file is replaced as a whole. Without a file nothing happens.
    """
    if not path.is_file():
        return
    odd: list[int] = []
    kept = [r for r in read_records(path, odd) if r["kind"] not in kinds or not _is_repeated(r, first_step)]
    if odd:
        _log.warning("%s: %d lines are no records and were removed, the first was line %d", path, len(odd), odd[0])
    with durable.replaced(path, text=True) as file:
        file.writelines(json_line(record) + "\n" for record in kept)


def _is_repeated(record: Mapping[str, Any], first_step: int) -> bool:
    evaluated_before = record["kind"] == "eval" and first_step > 0
    return bool(record["step"] > first_step if evaluated_before else record["step"] >= first_step)


class TensorBoardSink:
    """Writes scalars under `<kind>/<name>` over the number of steps done; a resumed run hides what it repeats.

    The event files are in `folder` inside the run folder.
    """

    def __init__(self, context: SinkContext, folder: str = "tensorboard") -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = context.first_step + 1 if context.first_step else 0
        with durable.explained(context.run_folder / folder):
            self._writer = SummaryWriter(str(context.run_folder / folder), purge_step=purge)

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """Write one record."""
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(printable(f"{kind}/{name}"), value, steps_done(kind, step))
        self._writer.flush()

    def alarm(self, alarm: Alarm) -> None:
        """Write an alarm as text under `alarms/<rule>`."""
        self._writer.add_text(f"alarms/{alarm.rule}", alarm.text().replace("\n", "\n\n"), alarm.done)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """Writes to a Weights & Biases run of the run folder's name in `project`. A resumed run continues it."""

    def __init__(self, context: SinkContext, project: str) -> None:
        wandb: Any = import_module("wandb")
        id_file = context.run_folder / "wandb_id"
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        self._run = wandb.init(
            project=project,
            name=context.run_folder.name,
            dir=str(context.run_folder),
            config=dict(context.config),
            id=run_id,
            resume="allow",
        )
        with durable.replaced(id_file, text=True) as file:
            file.write(f"{self._run.id}\n")

    @staticmethod
    def check_installed() -> None:
        """Raise ValueError when the wandb package is missing."""
        if find_spec("wandb") is None:
            raise ValueError(
                "telemetry.wandb_project is set but the wandb package is missing; run `pip install wandb`, or unset it"
            )

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """Write one record."""
        # Evaluation and training share step numbers, which W&B's own counter refuses to see twice.
        done = steps_done(kind, step)
        named = {printable(f"{kind}/{name}"): value for name, value in metrics.items()}
        self._run.log({f"{kind}/step": done, **named})

    def alarm(self, alarm: Alarm) -> None:
        """Raise an alert of W&B, which it can pass on by mail or to Slack; what clears is a number in the log alone."""
        level = {"notice": "INFO", "warning": "WARN", "stop": "ERROR"}[alarm.severity]
        if alarm.state == "raised":
            self._run.alert(title=f"{alarm.rule} at step {alarm.done}", text=alarm.text(), level=level)
        self._run.log({"alarm/step": alarm.done, f"alarm/{alarm.rule}": float(alarm.state == "raised")})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class OptionalSink:
    """Writes to a sink whose errors must not stop the run: the first is reported on stderr, all are counted."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink = name, sink
        self._written = self._lost = 0

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """Write one record, or report why not."""
        self._written += 1
        try:
            self._sink.write(step, kind, metrics)
        except Exception as error:  # somebody else's sink raises what it likes
            self._lost += 1
            if self._lost == 1:
                self._report(
                    f"did not take the record {kind} {step} ({_cause(error)}). Training goes on, and {METRICS_FILE} "
                    "has all records. Further errors are counted and reported at the end"
                )

    def alarm(self, alarm: Alarm) -> None:
        """Pass an alarm to a sink that takes alarms, or report why not."""
        take = getattr(self._sink, "alarm", None)
        if take is not None:
            try:
                take(alarm)
            except Exception as error:
                self._report(f"did not take the alarm {alarm.rule} ({_cause(error)})")

    def close(self) -> None:
        """Close the sink, and report how many records it did not take."""
        if self._lost:
            self._report(f"did not take {self._lost} of {self._written} records")
        try:
            self._sink.close()
        except Exception as error:
            self._report(f"could not be closed ({_cause(error)}); its last records may be missing")

    def _report(self, text: str) -> None:
        print(printable(f"WARNING: the metrics sink {self._name} {text}"), file=sys.stderr, flush=True)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Sinks:
    """Writes to several sinks as to one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """Write one record to every sink."""
        for sink in self._sinks:
            sink.write(step, kind, metrics)

    def alarm(self, alarm: Alarm) -> None:
        """Pass an alarm to every sink that takes alarms."""
        for sink in self._sinks:
            take = getattr(sink, "alarm", None)
            if take is not None:
                take(alarm)

    def close(self) -> None:
        """Close every sink, also when one fails; the first error is raised afterwards."""
        errors = []
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def check_sinks(config: "Config") -> None:
    """Raise PluginError when a sink cannot be found, lacks a method, or does not take its options.

    This makes no sink and connects to no service.
    """
    for sink in config.telemetry.all_sinks():
        _find(sink)


def _find(sink: PluginConfig) -> Plugin:
    plugin = plugins.find("sinks", sink.use, SETTING)
    plugins.require(plugin, ("write", "close"), SETTING)
    plugins.check_options(plugin, sink.options, SETTING, given=("context",))
    plugins.check_version(plugin, sink.version, SETTING)
    if plugin.target is WandbSink:
        try:
            WandbSink.check_installed()
        except ValueError as error:
            raise PluginError(str(error)) from error
    return plugin


def open_sinks(
    run_folder: Path,
    settings: TelemetryConfig,
    *,
    title: str,
    first_step: int,
    total_steps: int,
    kinds: Collection[Kind] = ("train", "eval"),
    config: Mapping[str, Any] | None = None,
) -> Sinks:
    """Open all sinks of a run, on the one rank that logs. Close them when done (`contextlib.closing`).

    `first_step` is the step that runs next (0 for a fresh run): later records of `kinds` are removed from
    metrics.jsonl. `title` and `total_steps` are for the progress bar, `config` is for services that store it. Raises
    PluginError before anything is written when a sink cannot be used.
    """
    context = SinkContext(run_folder, first_step, total_steps, config or {})
    found = [(sink, _find(sink)) for sink in settings.all_sinks()]
    path = run_folder / METRICS_FILE
    drop_records(path, first_step, kinds)
    console = Console(title, total_steps=total_steps, first_step=first_step)
    opened: list[Sink] = [JsonlSink(path), console]
    try:
        for sink, plugin in found:
            opened.insert(-1, OptionalSink(sink.use, plugin.target(context, **sink.options)))
    except BaseException:
        Sinks(opened).close()
        raise
    return Sinks(opened)
