"""This module watches engines that have requests, and gives those up that no longer say anything.

A server that dies drops its connections, which every request notices. A server that hangs keeps them. So while an
engine has requests it is asked now and then for its load, which a server answers between two batches, however long its
queue is. When it has said nothing for `silence_s`, its requests end with EngineTimeout, and may be asked elsewhere.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.engines.errors import EngineError, EngineTimeout, EngineUnreachable

ASK_EVERY = 0.2
"""How often an engine is asked, as a share of `silence_s`."""

Result = TypeVar("Result")


class Liveness:
    """It watches the engines that have requests. Use it inside one event loop.

    `silence_s`: seconds after which an engine that says nothing is given up; 0: none ever is.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._requests: Counter[EngineClient] = Counter()
        self._lost: dict[EngineClient, asyncio.Future[EngineError]] = {}
        self._watches: dict[EngineClient, asyncio.Task[None]] = {}
        self._suspended = False

    async def request(self, client: EngineClient, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what `work`, a request to an engine, returns. Raises EngineError when the engine is lost meanwhile."""
        lost = self._begin(client)
        task = asyncio.ensure_future(work)
        both: set[asyncio.Future[Any]] = {task, lost}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise lost.result()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, EngineError):
                    await task
            self._end(client)

    def lose(self, client: EngineClient, why: str) -> None:
        """End the requests of an engine that has gone, with EngineUnreachable."""
        error = EngineUnreachable(client.url, why, "Its requests are asked elsewhere", client.address.log)
        self._give_up(client, error)

    def keep(self, clients: Sequence[EngineClient]) -> None:
        """End the requests of all engines but these."""
        for client in set(self._lost).difference(clients):
            self.lose(client, "it no longer belongs to the run's engines")

    def suspend(self) -> None:
        """Watch nothing until `go_on`: an engine that loads weights may say nothing for long."""
        self._suspended = True

    def go_on(self) -> None:
        """Watch again."""
        self._suspended = False

    def _begin(self, client: EngineClient) -> "asyncio.Future[EngineError]":
        self._requests[client] += 1
        if self._requests[client] == 1:
            self._lost[client] = asyncio.get_running_loop().create_future()
            if self._silence_s > 0:
                self._watches[client] = asyncio.ensure_future(self._watch(client))
        return self._lost[client]

    def _end(self, client: EngineClient) -> None:
        self._requests[client] -= 1
        if self._requests[client] > 0:
            return
        del self._requests[client], self._lost[client]
        if (watch := self._watches.pop(client, None)) is not None:
            watch.cancel()

    def _give_up(self, client: EngineClient, error: EngineError) -> None:
        lost = self._lost.get(client)
        if lost is not None and not lost.done():
            lost.set_result(error)

    async def _watch(self, client: EngineClient) -> None:
        loop, every = asyncio.get_running_loop(), ASK_EVERY * self._silence_s
        heard = loop.time()
        while True:
            await asyncio.sleep(every)
            if self._suspended:
                heard = loop.time()
                continue
            try:
                await client.load(every)
            except (EngineTimeout, EngineUnreachable) as error:
                if self._suspended:
                    continue
                silent = loop.time() - heard
                if silent >= self._silence_s:
                    gone = EngineTimeout(
                        client.url,
                        f"it has requests, but has said nothing for {silent:.0f} s ({error.what})",
                        "It hangs: see its log, or raise rollout.engine.silence_timeout_s",
                        client.address.log,
                    )
                    self._give_up(client, gone)
                    return
            except EngineError:
                heard = loop.time()  # it answers, be it with a refusal
            else:
                heard = loop.time()
