"""This module has a run's engines write traces of themselves, by SGLang's own profiler."""

import asyncio
from pathlib import Path

from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.engines.errors import EngineError
from fiberpo_megatron.engines.pool import EnginePool


class PooledTraces:
    """Profiles all engines of a pool. The folder has to be visible from the engines' machines by the same path."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._running: dict[int, EngineClient] = {}
        """Engines that record, by their numbers."""

    @property
    def count(self) -> int:
        """Return the number of engines."""
        return len(self._pool.clients)

    def start(self, folder: Path, step: int, passes: int) -> list[str]:
        """Have every engine record its next `passes` forward passes; return what went wrong, a sentence each."""

        members = self._pool.members

        async def start_all() -> list[EngineError | None]:
            return await asyncio.gather(*(_started(members[i], folder / _stem(step, i), passes) for i in members))

        found = self._pool.run(start_all())
        self._running = {i: members[i] for i, error in zip(members, found, strict=True) if error is None}
        return [f"an engine could not begin its trace: {error}" for error in found if error is not None]

    def finish(self, folder: Path, step: int) -> tuple[list[str], list[str]]:
        """End the recording of every engine; return the names of the traces in `folder`, and what went wrong."""
        running, self._running = self._running, {}

        async def stop_all() -> list[EngineError | None]:
            return await asyncio.gather(*(_stopped(client) for client in running.values()))

        names, problems = [], []
        for (index, client), error in zip(running.items(), self._pool.run(stop_all()), strict=True):
            found = sorted(path.name for path in folder.glob(f"{_stem(step, index)}-*.json.gz"))
            names += found
            if not found:
                cause = f": {error}" if error is not None else "; its machine has to see the folder by the same path"
                problems.append(f"engine {client.url} wrote no trace into {folder}{cause}")
        return names, problems


def _stem(step: int, engine: int) -> str:
    """Return how the names of an engine's traces begin; SGLang adds its own ranks."""
    return f"step-{step:06d}-engine-{engine:03d}"


async def _started(client: EngineClient, path: Path, passes: int) -> EngineError | None:
    """Begin a recording whose files begin with `path`; return what the server said against it."""
    try:
        await client.start_profile(path.parent.resolve(), path.name, passes)
    except EngineError as error:
        return error
    return None


async def _stopped(client: EngineClient) -> EngineError | None:
    """End a recording that may have ended automatically, in which case SGLang refuses; return what it said."""
    try:
        await client.stop_profile()
    except EngineError as error:
        return error
    return None
