"""The console prints one line per step with the most important numbers, and shows a progress bar on a terminal."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import IO

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fiberpo_megatron.telemetry.alarms.record import Alarm
from fiberpo_megatron.telemetry.metrics import Kind, format_value, steps_done

COLUMNS: dict[Kind, tuple[tuple[str, str], ...]] = {
    "train": (
        ("reward/mean", "reward"),
        ("accuracy", "acc"),
        ("response_length/mean", "length"),
        ("entropy", "entropy"),
        ("ratio/p99", "ratio p99"),
        ("token/clip_share", "clip"),
        ("rollout_diff/mean", "rollout diff"),
        ("gradient_norm", "grad"),
        ("tokens_per_second", "speed"),
        ("seconds/total", "time"),
    ),
    "eval": (
        ("accuracy", "held-out accuracy"),
        ("reward/mean", "reward"),
        ("response_length/mean", "length"),
        ("seconds/evaluate", "time"),
    ),
    "sft": (
        ("loss", "loss"),
        ("gradient_norm", "grad"),
        ("tokens_per_second", "speed"),
        ("seconds/total", "time"),
    ),
}
LABELS: dict[Kind, str] = {"train": "step", "eval": "eval", "sft": "sft "}


def format_line(done: int, kind: Kind, metrics: Mapping[str, float | int | str], total_steps: int) -> str:
    """Return a line such as `step  12/150  reward 0.41  acc 44.0 %  ...`; missing metrics are left out."""
    width = len(str(total_steps))
    parts = [f"{LABELS[kind]} {done:{width}d}/{total_steps}"]
    for name, label in COLUMNS[kind]:
        value = metrics.get(name)
        if isinstance(value, (int, float)):
            parts.append(f"{label} {format_value(name, value).removesuffix(' nats').removesuffix(' tokens')}")
    return "  ".join(parts)


class Console:
    """Prints one line per record, and for `sft` (hundreds of short steps) at most one line every `sft_line_s` seconds.

    On a terminal a progress bar stays below the lines; elsewhere (a SLURM log) each line says the time left.
    """

    def __init__(
        self,
        title: str,
        *,
        total_steps: int,
        first_step: int = 0,
        file: IO[str] | None = None,
        sft_line_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = RichConsole(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self._total_steps = total_steps
        self._sft_line_s = sft_line_s
        self._clock = clock
        self._began = clock()
        self._first_step = first_step
        self._last_line: float | None = None
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = _progress_bar(self._console)
            self._task = self._progress.add_task(title, total=total_steps, completed=first_step)
            self._progress.start()

    def write(self, step: int, kind: Kind, metrics: Mapping[str, float | int | str]) -> None:
        """Print the record under the number of steps done."""
        done = steps_done(kind, step)
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
        if not self._is_due(kind, done):
            return
        line = format_line(done, kind, metrics, self._total_steps)
        if self._progress is None and kind != "eval":
            line += f"  left {self._time_left(done)}"
        self._console.print(Text(line, style="bold" if kind == "eval" else ""))
        self._console.file.flush()

    def alarm(self, alarm: Alarm) -> None:
        """Print an alarm with its causes and its advice."""
        self._console.print(Text(alarm.text(), style="yellow" if alarm.state == "raised" else ""))
        self._console.file.flush()

    def close(self) -> None:
        """Stop the progress bar."""
        if self._progress is not None:
            self._progress.stop()

    def _is_due(self, kind: Kind, done: int) -> bool:
        now = self._clock()
        due = (
            kind != "sft"
            or done == self._total_steps
            or self._last_line is None
            or now - self._last_line >= self._sft_line_s
        )
        if due:
            self._last_line = now
        return due

    def _time_left(self, done: int) -> str:
        passed = self._clock() - self._began
        seconds = round(passed / max(1, done - self._first_step) * (self._total_steps - done))
        minutes, seconds = divmod(max(0, seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _progress_bar(console: RichConsole) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
