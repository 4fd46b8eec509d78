"""The tests of environments share this module: pools with small bounds, and policies that answer from a script."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fiberpo_megatron.environments import Outcome, Task, Turn
from fiberpo_megatron.environments.host import EnvironmentPool, Failure
from fiberpo_megatron.environments.jobs import Say
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.plugins import BUILT_IN


def settings(use: str, **changes: Any) -> EnvironmentConfig:
    """Return the settings of a class of `misbehaving`, or of any import path, with bounds that are soon reached."""
    use = use if ":" in use or use in BUILT_IN["environments"] else f"tests.environments.misbehaving:{use}"
    bounds = {"deadline_s": 1.0, "memory_gib": 0.5, "output_kib": 64, "start_timeout_s": 60.0}
    return EnvironmentConfig(name="env", use=use, **(bounds | changes))


@asynccontextmanager
async def pool_of(use: str, folder: Path | None = None, **changes: Any) -> AsyncIterator[EnvironmentPool]:
    """Start a pool and close it at the end."""
    pool = EnvironmentPool(settings(use, **changes), folder=folder)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


def task(deed: str, number: int = 0) -> Task:
    """Return a task that asks for a deed of `misbehaving`."""
    return Task(prompt=f"please {deed}", answer=deed, metadata={"number": number}, id=f"{deed}/{number}")


def policy(answer: Callable[[int, Any], str] | str = "hello", delay_s: float = 0.0) -> Callable[[], Say]:
    """Return a `converse` whose policy answers with a text, or with what a function of (call, message) returns."""

    def converse() -> Say:
        calls = 0

        async def say(new: Any, tools: Any, max_tokens: int | None, stop: Any) -> Turn:
            nonlocal calls
            calls += 1
            await asyncio.sleep(delay_s)
            return Turn(answer if isinstance(answer, str) else answer(calls, new))

        return say

    return converse


def run_all(
    deeds: Sequence[str],
    folder: Path | None = None,
    converse: Callable[[], Say] | None = None,
    use: str = "Talking",
    **changes: Any,
) -> tuple[list[Outcome | Failure], Mapping[str, int]]:
    """Return the results of one conversation per deed, all at once, and what was counted."""

    async def scenario() -> tuple[list[Outcome | Failure], Mapping[str, int]]:
        async with pool_of(use, folder, **changes) as pool:
            runs = (
                pool.run(task(deed, number), converse or policy(), seed=number) for number, deed in enumerate(deeds)
            )
            return await asyncio.gather(*runs), pool.take_counts()

    return asyncio.run(scenario())


def failures_in(folder: Path) -> list[dict[str, Any]]:
    """Return the records of failures in a run's folder."""
    path = folder / "env_rank00000.failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
