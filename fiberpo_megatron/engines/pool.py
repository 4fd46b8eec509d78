"""This module holds all engines of a run as one object: addresses, clients, the network thread, and memory."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from fiberpo_megatron.closeable import Closeable
from fiberpo_megatron.engines.answers import EngineLoad
from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.engines.client import EngineAddress, EngineClient, ModelInfo
from fiberpo_megatron.engines.errors import EngineError, EngineRefused

CONTROL_CONNECTIONS = 16
"""Connections to each engine beside those of generation: a control call never waits for a running request."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Report:
    """Holds how an engine is."""

    load: EngineLoad
    info: ModelInfo
    seconds: float
    """Time until it had answered."""


class EnginePool(Closeable):
    """This pool has the engines of a run, for sampling from them, publishing to them and managing their memory.

    Engines have numbers, at first 0, 1, .. in the order of `addresses`; `change` lets engines come and go.
    `timeout_s` bounds one generation or scoring request; `max_concurrent` bounds the requests in flight to one engine.
    `transport` is the network seam for tests. `loop` is the thread for the network, where others use it too; the pool
    then leaves it running. Close the pool when done (`with`).

        with EnginePool([EngineAddress("http://127.0.0.1:30000")], timeout_s=60) as pool:
            completions = pool.run(pool.clients[0].generate([[1, 2, 3]], Sampling(max_response_tokens=8)))
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        *,
        timeout_s: float,
        max_concurrent: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
        loop: BackgroundLoop | None = None,
    ) -> None:
        if not addresses:
            raise ValueError("there are no engines; give rollout.engine.urls or let the run start some")
        self.timeout_s = timeout_s
        self._connections, self._transport = max_concurrent + CONTROL_CONNECTIONS, transport
        self.members = {number: self.client(address) for number, address in enumerate(addresses)}
        """The client of each engine, by the engine's number, in the order of the numbers. It is replaced as a whole."""
        self._left: list[EngineClient] = []
        """Clients of engines that are no members any more; requests of theirs may still be in flight."""
        self._owned = loop is None
        self._loop: BackgroundLoop | None = loop or BackgroundLoop("engines")

    def client(self, address: EngineAddress) -> EngineClient:
        """Return a client of a server, which need not be a member; the caller closes it."""
        return EngineClient(address, self.timeout_s, self._connections, self._transport)

    @property
    def clients(self) -> list[EngineClient]:
        """Return the clients of all engines, in the order of the engines' numbers."""
        return list(self.members.values())

    @property
    def numbers(self) -> list[int]:
        """Return the engines' numbers, in order."""
        return list(self.members)

    @property
    def addresses(self) -> list[EngineAddress]:
        """Return the engines' addresses, in the order of their numbers."""
        return [client.address for client in self.clients]

    def change(self, addresses: Mapping[int, EngineAddress], new: Collection[int] = ()) -> None:
        """Have these engines, by number, from now on. A client stays where its engine's address does, unless the engine
        is `new`: another server may have come to its address.

        What is in flight to an engine that goes fails with EngineUnreachable or goes on to its end; its connections are
        closed with the pool.
        """
        if not addresses:
            raise ValueError("a pool must have an engine; close it when none is left")
        before = self.members
        self.members = {
            number: client
            if (client := before.get(number)) is not None and client.address == address and number not in new
            else self.client(address)
            for number, address in sorted(addresses.items())
        }
        gone = [client for client in before.values() if client not in self.members.values()]
        self._left.extend(gone)

    def submit(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Start `work` on the pool's event loop; the future has its result."""
        if self._loop is None:
            work.close()
            raise RuntimeError("the engine pool is closed; make another one")
        return self._loop.submit(work)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of `work`; it is cancelled when this thread is interrupted."""
        if self._loop is None:
            work.close()
            raise RuntimeError("the engine pool is closed; make another one")
        return self._loop.run(work)

    def wait(self, futures: "Collection[Future[Any]]", timeout_s: float) -> bool:
        """Wait until one of some futures is done, or for so many seconds; return whether one is."""
        if self._loop is None:
            raise RuntimeError("the engine pool is closed; make another one")
        return self._loop.wait(futures, timeout_s)

    def on_all(self, call: Callable[[EngineClient], Awaitable[Result]]) -> list[Result]:
        """Return the call's result from every engine. The first error is raised when all have answered."""
        return self.run(self.each(call))

    def begin_on_all(self, call: Callable[[EngineClient], Awaitable[None]]) -> "Future[None]":
        """Begin a call to every engine. The future has the first error when all have answered."""

        async def all_engines() -> None:
            await self.each(call)

        return self.submit(all_engines())

    async def each(self, call: Callable[[EngineClient], Awaitable[Result]]) -> list[Result]:
        """Return the call's result from every engine, for a coroutine on the pool's loop; as `on_all` otherwise."""
        found = await asyncio.gather(*(call(client) for client in self.clients), return_exceptions=True)
        return [_raised(item) for item in found]

    def reports(self, deadline_s: float) -> list[Report | str]:
        """Ask every engine for its load and its weights, all at once, and wait `deadline_s` at most.

        Returns one entry for each engine, in order: what it said, or in words why it did not answer.
        """

        async def ask(client: EngineClient) -> Report | str:
            began = time.perf_counter()
            try:
                load, info = await asyncio.gather(client.load(deadline_s), client.model_info(deadline_s))
            except EngineError as error:
                return error.what
            return Report(load, info, time.perf_counter() - began)

        return self.on_all(ask)

    def check_preferences(self) -> None:
        """Raise EngineRefused when an engine was started with arguments that change what requests ask for."""
        self.on_all(lambda client: client.check_preferences())

    def require_memory_saver(self) -> None:
        """Raise EngineRefused when an engine was started in a way that never gives memory up."""

        async def check(client: EngineClient) -> None:
            if not await client.memory_saver():
                raise EngineRefused(
                    client.url,
                    "it shares its GPUs with the trainer (rollout.engine.colocated), but cannot release their memory",
                    "Start it with --enable-memory-saver",
                    client.address.log,
                )

        self.on_all(check)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Have every engine give up the memory of `tags` ("kv_cache", "weights"), contents included."""
        self.on_all(lambda client: client.release_memory(tags))

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Have every engine take its memory again; weights must then be published."""
        self.on_all(lambda client: client.resume_memory(tags))

    def close(self) -> None:
        """Close the connections and the thread; idempotent."""
        loop, self._loop = self._loop, None
        if loop is None:
            return

        async def close_all() -> None:
            for client in (*self.clients, *self._left):
                await client.close()

        loop.run(close_all())
        if self._owned:
            loop.close()


def _raised(item: Result | BaseException) -> Result:
    if isinstance(item, BaseException):
        raise item
    return item
