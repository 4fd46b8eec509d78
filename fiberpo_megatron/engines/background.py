"""An event loop in a separate thread lets the synchronous trainer use asynchronous clients."""

import asyncio
import threading
from collections.abc import Collection, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundLoop:
    """Runs coroutines in a thread; close it when done."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Start a coroutine; the future has its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine and return its result; it is cancelled when this thread is interrupted."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def wait(self, futures: "Collection[Future[Any]]", timeout_s: float) -> bool:
        """Wait until one of some futures is done, or for so many seconds; return whether one is."""
        return bool(wait(futures, timeout_s, FIRST_COMPLETED).done)

    def close(self) -> None:
        """Stop the loop; calling this again does nothing."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
