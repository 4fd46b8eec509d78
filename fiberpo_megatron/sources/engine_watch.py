"""This module notes after each step how the engines are: in engines.json, and as metrics."""

import logging
import time
from pathlib import Path

from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.telemetry.engine_states import EngineState, EngineStates, write_engine_states

DEADLINE_S = 1.0
"""Seconds within which an engine says how it is; a step waits no longer for it."""
_log = logging.getLogger(__name__)


class EngineWatch:
    """Asks all engines at once, on the one rank that logs, and writes down what they say."""

    def __init__(self, pool: EnginePool, run_folder: Path, deadline_s: float = DEADLINE_S) -> None:
        self._pool, self._folder, self._deadline_s = pool, run_folder, deadline_s

    def __call__(self, step: int) -> dict[str, float]:
        """Return the metrics of the engines after a step, and replace engines.json.

        An engine that does not answer in time is in the file with the reason. Nothing that goes wrong here ends a run:
        the next generation says what is the matter with an engine.
        """
        asked = time.time()
        engines = tuple(self._states())
        try:
            write_engine_states(self._folder, EngineStates(step, asked, engines))
        except OSError as error:
            _log.warning("the states of the engines after step %d are not written: %s", step, error)
        serving = [engine for engine in engines if engine.state == "serving"]
        return {
            "engines/serving": float(len(serving)),
            "engines/not_answering": float(len(engines) - len(serving)),
            "engines/queued": float(sum(engine.queued or 0 for engine in serving)),
        }

    def _states(self) -> list[EngineState]:
        found = []
        for address, said in zip(self._pool.addresses, self._pool.reports(self._deadline_s), strict=True):
            if isinstance(said, str):
                found.append(EngineState(address.url, "not answering", detail=said))
                continue
            load = said.load
            found.append(
                EngineState(
                    address.url,
                    "serving",
                    weight_version=said.info.weight_version,
                    running=load.running,
                    queued=load.queued,
                    token_usage=load.token_usage,
                    cache_hit_rate=load.cache_hit_rate,
                    generation_tokens_per_second=load.generation_tokens_per_second,
                    answered_in_s=said.seconds,
                )
            )
        return found
