"""This module computes a run's goodput: the share of its time that went into steps which count, over all restarts.

A run folder has a line in `sessions.jsonl` for each start. Together with the times of the steps in metrics.jsonl it
says what was lost: a step that was done and had to be repeated is in metrics.jsonl once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable

SESSIONS_FILE = "sessions.jsonl"


@dataclass(frozen=True)
class Session:
    """Holds when one start of a run began."""

    step: int
    """The step with which it began."""
    began: float
    """Seconds since 1970 at which its ranks began to set up."""
    ready: float
    """Seconds since 1970 at which its first step began: model, engines and checkpoint were loaded."""


class Goodput:
    """Adds up the time of the steps that count, and what restarts have cost."""

    def __init__(self, sessions: Sequence[Session], past: Sequence[Mapping[str, Any]] = ()) -> None:
        """`sessions` are all starts so far, the running one last; `past` are the records of metrics.jsonl."""
        self._sessions = tuple(sessions)
        # A session's steps count up to where a later one went on.
        ends = [min((later.step for later in sessions[place + 1 :]), default=None) for place in range(len(sessions))]
        self._counted = [0.0 for _ in sessions]
        for record in past:
            if record.get("kind") == "train":
                place = self._session_of(record["step"], ends)
                if place is not None:
                    self._add(place, record["step"], record.get("seconds/total"))

    def _session_of(self, step: int, ends: Sequence[int | None]) -> int | None:
        """Return the place of the session whose step counts: the last one that was not superseded at it; None for a
        step from before the first known session."""
        for place in reversed(range(len(self._sessions))):
            end = ends[place]
            if self._sessions[place].step <= step and (end is None or step < end):
                return place
        return None

    def _add(self, place: int, step: int, seconds: object) -> None:
        if isinstance(seconds, int | float):
            session = self._sessions[place]
            setup = session.ready - session.began if step == session.step else 0.0
            self._counted[place] += max(0.0, seconds - setup)

    def step(self, step: int, seconds: float, now: float) -> dict[str, float]:
        """Count a step of the running session, which took `seconds` (in its first one with the set-up) and ended at
        `now`; return the metrics of the run so far."""
        self._add(len(self._sessions) - 1, step, seconds)
        elapsed = max(now - self._sessions[0].began, 1e-9)
        return {
            "goodput": min(1.0, sum(self._counted) / elapsed),
            "restart/count": float(len(self._sessions) - 1),
            "restart/lost_seconds": self.lost,
        }

    @property
    def lost(self) -> float:
        """Return the seconds between the last step that counts of each start and the first step of the next one: steps
        that are repeated, the time without a process, and setting up again."""
        pairs = zip(self._sessions, self._sessions[1:], self._counted)
        return sum(max(0.0, later.ready - (earlier.ready + counted)) for earlier, later, counted in pairs)


def begin_session(run_folder: Path, session: Session, fresh: bool) -> list[Session]:
    """Add the running start to sessions.jsonl, and return all of them. With `fresh` the run begins anew, and earlier
    starts in the folder are forgotten. Lines that cannot be read are left out."""
    path = run_folder / SESSIONS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() and not fresh else []
    sessions = [found for found in map(_session, lines) if found is not None] + [session]
    with durable.replaced(path, text=True) as file:
        file.writelines(json.dumps(asdict(one)) + "\n" for one in sessions)
    return sessions


def _session(line: str) -> Session | None:
    try:
        found = json.loads(line)
        return Session(int(found["step"]), float(found["began"]), float(found["ready"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
