"""Where records go: the console, metrics.jsonl, TensorBoard, Weights & Biases.

A record is one step's metrics of one kind. Sinks keep it whole: names that nobody knows are written as well.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from fiberpo_megatron.telemetry.console import Console
from fiberpo_megatron.telemetry.metrics import Kind, steps_done
from fiberpo_megatron.telemetry.settings import TelemetryConfig

METRICS_FILE = "metrics.jsonl"
Metrics = Mapping[str, float | int | str]


class Sink(Protocol):
    """One place that records go to."""

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """`step` counts from 0 for training steps; for an evaluation it is the number of steps before it."""
        ...

    def close(self) -> None: ...


class JsonlSink:
    """`metrics.jsonl`: {"step": s, "kind": k, name: value, ...} a line, on the disk before `write` returns.

    Values that are not finite are written as null, so that every line is standard JSON.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        record: dict[str, Any] = {"step": step, "kind": kind}
        record.update((name, _finite(value)) for name, value in metrics.items())
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finite(value: float | int | str) -> float | int | str | None:
    if isinstance(value, (str, int)):
        return value
    return float(value) if isfinite(value) else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a torn last line (the run was killed while writing) is left out.

    Empty if there is no file. ValueError naming the line for any other line that is not a record.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"]), "kind": str(record["kind"])})
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # complete lines end with a newline, so the split's last item is a torn one
                break
            raise ValueError(f"{path}, line {number}: not a metrics record: {line[:120]!r}; remove the line") from None
    return records


def drop_records(path: Path, first_step: int, kinds: Collection[Kind]) -> None:
    """Remove the records of `kinds` that a run from step `first_step` on writes again, and a torn last line.

    The evaluation of the weights it starts from is kept, unless it starts at 0. The file is replaced
    atomically; without a file nothing happens.
    """
    if not path.is_file():
        return
    kept = [r for r in read_records(path) if r["kind"] not in kinds or not _is_repeated(r, first_step)]
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _is_repeated(record: Mapping[str, Any], first_step: int) -> bool:
    evaluated_before = record["kind"] == "eval" and first_step > 0
    return bool(record["step"] > first_step if evaluated_before else record["step"] >= first_step)


class TensorBoardSink:
    """Scalars under `<kind>/<name>` over the number of steps done; a resumed run hides what it repeats."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(f"{kind}/{name}", value, steps_done(kind, step))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run of the run folder's name. A resumed run continues it."""

    def __init__(self, wandb: Any, project: str, run_folder: Path, config: Mapping[str, Any]) -> None:
        id_file = run_folder / "wandb_id"
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        self._run = wandb.init(
            project=project,
            name=run_folder.name,
            dir=str(run_folder),
            config=dict(config),
            id=run_id,
            resume="allow",
        )
        id_file.write_text(f"{self._run.id}\n", encoding="utf-8")

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        # Evaluation and training share step numbers, which W&B's own counter refuses to see twice.
        done = steps_done(kind, step)
        self._run.log({f"{kind}/step": done, **{f"{kind}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        self._run.finish()


def _import_wandb() -> Any:
    if find_spec("wandb") is None:
        raise ValueError(
            "telemetry.wandb_project is set but the wandb package is missing; run `pip install wandb`, or unset it"
        )
    return import_module("wandb")


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, kind: Kind, metrics: Metrics) -> None:
        """Write one record to every sink."""
        for sink in self._sinks:
            sink.write(step, kind, metrics)

    def close(self) -> None:
        """Close every sink, also when one fails."""
        errors = []
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    """All sinks of a run, on the one rank that logs.

    `first_step` is the step that runs next (0 for a fresh run): later records of `kinds` are removed from
    metrics.jsonl. `title` and `total_steps` are for the progress bar, `config` is for W&B.
    """
    wandb = _import_wandb() if settings.wandb_project else None
    path = run_folder / METRICS_FILE
    drop_records(path, first_step, kinds)
    sinks: list[Sink] = [JsonlSink(path)]
    if settings.tensorboard:
        sinks.append(TensorBoardSink(run_folder / "tensorboard", first_step))
    if settings.wandb_project:
        sinks.append(WandbSink(wandb, settings.wandb_project, run_folder, config or {}))
    sinks.append(Console(title, total_steps=total_steps, first_step=first_step))
    return Sinks(sinks)
