"""This module opens and closes the update that SGLang wants around loads from memory and from a broadcast."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.engines.errors import EngineError, EngineRefused
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.weight_sync.base import Deadline

QUICK_S = 10.0
"""Seconds that a call may take that only tidies up."""


async def open_update(engines: EnginePool, deadline: Deadline) -> None:
    """Open the update on every engine before anything is sent: a refusal must not leave one waiting.

    An engine refuses while an update is open, which a trainer leaves behind that was killed in the middle of one. Then
    the update is closed on all engines and opened once more.
    """
    try:
        await engines.each(lambda client: client.begin_weight_update(deadline.left()))
    except EngineRefused:
        with suppress(EngineError):
            await engines.each(lambda client: client.end_weight_update(QUICK_S))
        await engines.each(lambda client: client.begin_weight_update(deadline.left()))


def end_quietly(engines: EnginePool) -> None:
    """Close the update after a failure."""
    quietly(engines, lambda client: client.end_weight_update(QUICK_S))


def quietly(engines: EnginePool, call: Callable[[EngineClient], Awaitable[None]]) -> None:
    """Make a call that only tidies up: an engine may be gone already, and an earlier failure is the one to report."""
    with suppress(EngineError):
        engines.on_all(call)
