"""This module notes how the engines are: in engines.json, and as metrics."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fiberpo_megatron.engines.pool import EnginePool, Report
from fiberpo_megatron.rollout.fleet import Member
from fiberpo_megatron.telemetry.engine_states import EngineState, EngineStates, write_engine_states

DEADLINE_S = 1.0
"""Seconds within which an engine says how it is; a step waits no longer for it."""
_log = logging.getLogger(__name__)


class EngineWatch:
    """Asks all engines at once, on rank 0, and writes down what they say and what the fleet knows of them."""

    def __init__(self, pool: EnginePool, run_folder: Path, deadline_s: float = DEADLINE_S) -> None:
        self._pool, self._folder, self._deadline_s = pool, run_folder, deadline_s
        self._step = -1
        self._states: dict[int, EngineState] = {}

    def changed(self, members: Sequence[Member]) -> None:
        """Take over what the fleet knows, and replace engines.json where that is new."""
        states = {member.number: _known(member, self._states.get(member.number)) for member in members}
        if states != self._states:
            self._states = states
            self._write()

    def __call__(self, step: int) -> dict[str, float]:
        """Return the metrics of the engines after a step, and replace engines.json.

        An engine that does not answer in time is in the file with the reason. Nothing that goes wrong here ends a run:
        the next generation says what is the matter with an engine.
        """
        self._step = step
        for (number, client), said in zip(self._pool.members.items(), self._pool.reports(self._deadline_s)):
            known = self._states.get(number, EngineState(client.url, "serving", number=number, generation=0))
            self._states[number] = _asked(known, said)
        self._write()
        states = [state for state in self._states.values() if state.state != "left"]
        serving = [state for state in states if state.state == "serving"]
        return {
            "engines/serving": float(len(serving)),
            "engines/not_answering": float(len(states) - len(serving)),
            "engines/queued": float(sum(state.queued or 0 for state in serving)),
            "engines/restarts": float(sum(state.generation or 0 for state in self._states.values())),
        }

    def _write(self) -> None:
        states = tuple(self._states[number] for number in sorted(self._states))
        try:
            write_engine_states(self._folder, EngineStates(self._step, time.time(), states))
        except OSError as error:
            _log.warning("the states of the engines after step %d are not written: %s", self._step, error)


def _known(member: Member, before: EngineState | None) -> EngineState:
    """What the fleet knows of an engine, beside what it said itself while it served."""
    address = "" if member.address is None else member.address.url
    known = EngineState(
        address,
        member.state,
        member.detail,
        number=member.number,
        generation=max(member.generation, 0),
        since=member.since,
        weight_version=member.version,
    )
    if before is None or member.state != "serving" or before.address != address:
        return known
    own = {name: getattr(known, name) for name in ("state", "detail", "generation", "since", "weight_version")}
    return replace(before, **own)


def _asked(known: EngineState, said: Report | str) -> EngineState:
    """The state of an engine after it was asked. One that did not answer may answer the fleet later."""
    if isinstance(said, str):
        silent = EngineState(known.address, "not answering", said)
        return replace(silent, number=known.number, generation=known.generation, since=known.since)
    load = said.load
    return replace(
        known,
        state="serving" if known.state == "not answering" else known.state,
        detail="" if known.state == "not answering" else known.detail,
        weight_version=said.info.weight_version,
        running=load.running,
        queued=load.queued,
        token_usage=load.token_usage,
        cache_hit_rate=load.cache_hit_rate,
        generation_tokens_per_second=load.generation_tokens_per_second,
        answered_in_s=said.seconds,
    )
