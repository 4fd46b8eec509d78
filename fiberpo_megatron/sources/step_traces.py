"""This module joins what all leaders noted of a step's trajectories, and has rank 0 write the step's trace."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.telemetry.step_trace import tail_seconds, write_trace
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.tracks import MOST, Track

_log = logging.getLogger(__name__)
MOST_OF_A_STEP = 100_000
"""Stretches, and requests, of all trajectories of a step that its trace has: other ranks wait while it is written."""


class StepTraces:
    """It writes the trace of each step of a run.

    keep: `telemetry.trace_steps_kept`; 0: none is written. clock: gives the time in s since 1970.
    """

    def __init__(
        self, folder: Path, layout: Layout, timers: PhaseTimers, keep: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._layout, self._timers, self._keep, self._clock = folder, layout, timers, keep, clock

    def write(self, step: int, tracks: Sequence[Track]) -> None:
        """Write the trace of a step that has been published. Every rank calls it, the leaders with the tracks of their
        trajectories; what cannot be written is a warning of rank 0.

        A step of many trajectories has fewer stretches and requests of each, so that a trace of 10,000 trajectories
        is written in a second or two (docs/watch.md).
        """
        if not self._keep:
            return
        with self._timers("traces"):
            most = max(2, min(MOST, MOST_OF_A_STEP // (len(tracks) * self._layout.data_size or 1)))
            mine = [{"leader": self._layout.data_rank, **track.facts(most)} for track in tracks]
            everyone: list[list[Mapping[str, Any]]] = self._layout.gather_json(mine, root_only=True)
            if self._layout.rank != 0:
                return
            found = [track for share in everyone for track in share]
            try:
                write_trace(self._folder, step, found, self._timers.blocks(self._clock()), keep=self._keep)
            except OSError as error:  # it is for people: the other ranks need not stop because of it
                _log.warning("the trace of step %d is not written: %s", step, error)


def tail_metrics(ended: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the metric of how long a step waited for its last trajectory, from all leaders' ends (s since 1970)."""
    every = [end for of_rank in ended for end in of_rank]
    return {"rollout/tail_seconds": tail_seconds(every)} if every else {}
