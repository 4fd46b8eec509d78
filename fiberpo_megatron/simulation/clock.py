"""This module has an event loop on virtual time, which the trainer's main thread runs itself while it waits.

Production's loop runs in a thread of its own (`engines/background.py`). Here there is one thread: whenever production
waits for the loop, the loop runs up to what is waited for. So nothing depends on a scheduler, and a run repeats
exactly.
"""

import asyncio
import math
import selectors
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar, TypeVarTuple

from fiberpo_megatron.engines.background import BackgroundLoop

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class Deadlock(BaseException):
    """Production waits, and nothing will ever happen: no timer runs, and no event is due."""


class Killed(KeyboardInterrupt):
    """The trainer's process is gone. asyncio lets it through, as it does a KeyboardInterrupt."""


class _Clock(selectors.SelectSelector):
    """It is asked for events of the network, of which there are none, and lets the time pass instead."""

    def __init__(self, began: float, event: Callable[[], None]) -> None:
        super().__init__()
        self.now, self._event = began, event

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock
        self.now += timeout
        self._event()
        return []


class _Loop(asyncio.SelectorEventLoop):
    """Its time is that of the clock. Tasks and futures are hashed by their numbers, so that sets of them have an order
    that repeats."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__(clock)
        self._clock, self._numbers = clock, count()
        self._clock_resolution = max(1e-9, 2 * math.ulp(clock.now))  # below that a timer that is due never runs
        self.set_task_factory(lambda loop, work, **named: _Task(self._numbers, work, loop=loop, **named))
        self.set_exception_handler(lambda loop, context: None)  # tasks of a killed process say that they never ended

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Args], Result], *args: *Args) -> Any:
        """Call it at once: there is no other thread."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def create_future(self) -> "asyncio.Future[Any]":
        return _Future(self._numbers, loop=self)


class _Task(asyncio.Task[Any]):
    def __init__(self, numbers: "count[int]", work: Any, **named: Any) -> None:
        self._number = next(numbers)
        super().__init__(work, **named)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    def __init__(self, numbers: "count[int]", **named: Any) -> None:
        self._number = next(numbers)
        super().__init__(**named)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(BackgroundLoop):
    """It stands for the network's thread of one process, from time `began` (s) on.

    `event` is called whenever something may have happened. What it raises leaves the call in which production waits.
    Raises Deadlock there when a wait would never end.
    """

    def __init__(self, began: float, event: Callable[[], None]) -> None:
        self._loop = _Loop(_Clock(began, event))

    def time(self) -> float:
        """Return the virtual time (s)."""
        return self._loop.time()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine and return its result."""
        future = self.submit(work)
        self._until([future], None)
        return future.result()

    def wait(self, futures: "Collection[Future[Any]]", timeout_s: float) -> bool:
        """Let the time pass until one of some futures is done, or for so many seconds; return whether one is."""
        self._until(futures, timeout_s)
        return any(future.done() for future in futures)

    def sleep(self, seconds: float) -> None:
        """Let the time pass: the main thread works, and what is on the loop goes on beside it."""
        self._until([], seconds)

    def call_later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something after so many seconds."""
        self._loop.call_later(seconds, call)

    def close(self) -> None:
        """Cancel what is left, and let it end."""
        if self._loop.is_closed():
            return
        until = self.time() + CLOSE_S
        while (tasks := asyncio.all_tasks(self._loop)) and self.time() < until:
            for task in sorted(tasks, key=hash):
                task.cancel()
            self._loop.call_later(0.01, self._loop.stop)
            with suppress(Killed):  # groups of tasks raise again what ended one of them
                self._loop.run_forever()
        self._loop.close()

    def _until(self, futures: "Collection[Future[Any]]", timeout_s: float | None) -> None:
        if any(future.done() for future in futures) or timeout_s == 0:
            return
        for future in futures:
            future.add_done_callback(lambda _: self._loop.stop())
        passed: list[bool] = []

        def pass_by() -> None:
            passed.append(True)
            self._loop.stop()

        timer = None if timeout_s is None else self._loop.call_later(timeout_s, pass_by)
        while not passed and not any(future.done() for future in futures):
            self._loop.run_forever()  # a stop that was meant for an earlier wait ends it early
        if timer is not None:
            timer.cancel()


CLOSE_S = 3600.0
"""Virtual seconds that what is cancelled may take to end."""
