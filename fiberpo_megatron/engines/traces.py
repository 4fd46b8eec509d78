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
        self._running: list[int] = []
        """Engines that record."""

    @property
    def count(self) -> int:
        """Return the number of engines."""
        return len(self._pool.clients)

    def start(self, folder: Path, step: int, passes: int) -> list[str]:
        """Have every engine record its next `passes` forward passes; return what went wrong, a sentence each."""

        async def start_all() -> list[EngineError | None]:
            return await asyncio.gather(*(self._start(i, folder, step, passes) for i in range(self.count)))

        found = self._pool.run(start_all())
        self._running = [index for index, error in enumerate(found) if error is None]
        return [f"an engine could not begin its trace: {error}" for error in found if error is not None]

    def finish(self, folder: Path, step: int) -> tuple[list[str], list[str]]:
        """End the recording of every engine; return the names of the traces in `folder`, and what went wrong."""
        running, self._running = self._running, []

        async def stop_all() -> list[EngineError | None]:
            return await asyncio.gather(*(_stopped(self._pool.clients[index]) for index in running))

        names, problems = [], []
        for index, error in zip(running, self._pool.run(stop_all()), strict=True):
            found = sorted(path.name for path in folder.glob(f"{_stem(step, index)}-*.json.gz"))
            names += found
            if not found:
                url = self._pool.clients[index].url
                cause = f": {error}" if error is not None else "; its machine has to see the folder by the same path"
                problems.append(f"engine {url} wrote no trace into {folder}{cause}")
        return names, problems

    async def _start(self, index: int, folder: Path, step: int, passes: int) -> EngineError | None:
        try:
            await self._pool.clients[index].start_profile(folder.resolve(), _stem(step, index), passes)
        except EngineError as error:
            return error
        return None


def _stem(step: int, engine: int) -> str:
    """Return how the names of an engine's traces begin; SGLang adds its own ranks."""
    return f"step-{step:06d}-engine-{engine:03d}"


async def _stopped(client: EngineClient) -> EngineError | None:
    """End a recording that may have ended automatically, in which case SGLang refuses; return what it said."""
    try:
        await client.stop_profile()
    except EngineError as error:
        return error
    return None
