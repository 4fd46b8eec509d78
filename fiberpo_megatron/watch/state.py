"""This module says what state a run is in: from its lock, which holds a sign of life, and from its last record."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fiberpo_megatron.run_lock import Look, look
from fiberpo_megatron.watch.following import FollowedRun
from fiberpo_megatron.watch.inside import Outside, inside

Name = Literal["running", "quiet", "finished", "stopped", "lost", "unknown"]
SILENT_S = 60.0
"""Seconds without a beat of the lock after which its holder counts as lost; a holder writes one every five seconds."""
QUIET_STEPS = 10.0
"""A run is quiet when its last record is older than so many steps of its median duration, and than QUIET_S."""
QUIET_S = 300.0


@dataclass(frozen=True)
class RunState:
    """Says whether a run goes on."""

    name: Name
    detail: str
    """One sentence for people."""


class StateWatcher:
    """Watches the lock of one run. Whether its holder lives is judged by whether the beats change, as a newcomer does
    who wants the folder: clocks of other machines are not compared, except until the first minute has passed."""

    def __init__(self, run: FollowedRun) -> None:
        self._run = run
        self._seen: Look | None = None
        self._changed = time.monotonic()

    def state(self, planned_steps: int | None) -> RunState:
        """Return the state of now.

        Args:
            planned_steps: the steps after which the run has ended, if known.
        """
        try:
            found = _look(self._run.folder)
        except (OSError, Outside) as error:
            return RunState("unknown", f"The lock cannot be read: {error}.")
        last = self._last_step()
        whole = planned_steps is not None and last is not None and last + 1 >= planned_steps
        if found is None:
            return (
                RunState("finished", "It has done all its steps.") if whole else RunState("unknown", "It has no lock.")
            )
        if found.released:
            if whole:
                return RunState("finished", "It has done all its steps.")
            return RunState("stopped", "It has ended before its last step; --resume goes on.")
        if found.runs is False:
            return RunState("lost", f"{found.holder} has ended without releasing the folder; --resume goes on.")
        silent = self._silent_s(found)
        if found.runs is None and silent > SILENT_S:
            return RunState("lost", f"{found.holder} has given no sign of life for {_duration(silent)}.")
        return self._running(found)

    def _silent_s(self, found: Look) -> float:
        """Return for how long the beat has not changed."""
        now = time.monotonic()
        if self._seen is None:
            self._changed = now - max(0.0, time.time() - found.modified)
        elif found.content != self._seen.content:
            self._changed = now
        self._seen = found
        return now - self._changed

    def _running(self, found: Look) -> RunState:
        age = _age(self._run.folder)
        step_s = self._step_s()
        if age is not None and age > max(QUIET_S, QUIET_STEPS * step_s):
            usual = f"; a step takes {_duration(step_s)}" if step_s else ""
            return RunState("quiet", f"{found.holder} lives, but wrote no record for {_duration(age)}{usual}.")
        return RunState("running", f"{found.holder}.")

    def _last_step(self) -> int | None:
        with self._run.lock:
            tables = [self._run.tables[kind] for kind in ("train", "sft") if kind in self._run.tables]
            return max((int(table.steps[-1]) for table in tables if len(table)), default=None)

    def _step_s(self) -> float:
        """Return the median duration of the last steps, 0 if that is unknown."""
        with self._run.lock:
            for kind in ("train", "sft"):
                table = self._run.tables.get(kind)
                found = None if table is None else table.column("seconds/total")
                if found is not None and len(found):
                    values = sorted(float(value) for value in found[-50:] if value == value)
                    return values[len(values) // 2] if values else 0.0
        return 0.0


def _look(folder: Path) -> Look | None:
    """Return what the lock says. Raises Outside where a link leads out of the folder, and OSError."""
    locks = inside(folder, "lock")
    for name in os.listdir(locks) if locks.is_dir() else ():
        inside(folder, "lock", name)
    return look(folder.resolve())


def _age(folder: Path) -> float | None:
    """Return the seconds since metrics.jsonl was written, by the clocks of this machine and the file server's."""
    try:
        return max(0.0, time.time() - inside(folder, "metrics.jsonl").stat().st_mtime)
    except (OSError, Outside):
        return None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def planned_steps(config: dict[str, Any], kind: str) -> int | None:
    """Return the number of steps of a kind that a resolved config asks for, if it does."""
    section = config.get("sft" if kind == "sft" else "trainer")
    steps = section.get("steps") if isinstance(section, dict) else None
    return steps if isinstance(steps, int) else None
