"""This module waits for work of this process and of the engines at the same time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

GRACE_S = 2.0
"""Seconds that an engine may take to say to rank 0 why a collective failed. SGLang's server looks every second whether
its processes live."""


@dataclass(frozen=True)
class Sending:
    """Holds the futures of a round that is on its way; None stands for a rank that has nothing to wait for."""

    passed: "Future[None] | None"
    """It ends when the next round may be sent. None says that it may be sent at once."""
    loaded: "Future[None] | None"
    """It ends when the engines have loaded the round, and has the error of a failure."""


async def together(calls: Iterable[Awaitable[Any]], grace_s: float = 0.0) -> None:
    """Await all calls; the first failure is raised at once, because the other engines may then wait in vain.

    `grace_s`: seconds in which the other calls may end before that.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        try:
            await asyncio.gather(*tasks)
        except Exception:
            if grace_s:
                await asyncio.wait(tasks, timeout=grace_s)
            raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def in_thread(work: Callable[[], None]) -> "Future[None]":
    """Run `work` in a daemon thread, which does not keep the process alive if it hangs in a collective."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return future


def success_of(own: "Future[None]") -> "Future[None]":
    """Return a future that ends when `own` succeeds, and stays open when it fails."""
    result: Future[None] = Future()
    result.set_running_or_notify_cancel()  # a caller cannot cancel it any more

    def ended(done: "Future[None]") -> None:
        if done.exception() is None:
            result.set_result(None)

    own.add_done_callback(ended)
    return result


def all_of(futures: Sequence["Future[None]"]) -> "Future[None] | None":
    """Return a future that ends when all have ended, or with the first failure; None for no futures."""
    if not futures:
        return None
    result: Future[None] = Future()
    lock = threading.Lock()
    left = set(futures)

    def ended(done: "Future[None]") -> None:
        with lock:
            left.discard(done)
            if not result.done() and (done.exception() is not None or not left):
                _settle(result, done.exception())

    for future in futures:
        future.add_done_callback(ended)
    return result


def _settle(result: "Future[None]", error: BaseException | None) -> None:
    if error is None:
        result.set_result(None)
    else:
        result.set_exception(error)


def both(own: "Future[None] | None", engines: "Future[None] | None") -> "Future[None] | None":
    """Return a future that ends when this side and the engines have done their parts of a collective.

    The first failure ends it. An engine's answer says more than this side's error, so it is waited for briefly, also on
    ranks without `engines`, because rank 0 gets the answer.
    """
    if own is None:
        return engines
    result: Future[None] = Future()
    lock = threading.Lock()

    def settle(error: BaseException | None) -> None:
        with lock:
            if not result.done():
                _settle(result, error)

    def of_engines(done: "Future[None]") -> None:
        error = done.exception() if not done.cancelled() else TimeoutError("the request was cancelled")
        if error is not None or own.done() and own.exception() is None:
            settle(error)

    def of_own(done: "Future[None]") -> None:
        error = done.exception()
        if error is not None:
            threading.Timer(GRACE_S, settle, (error,)).start()
        elif engines is None or engines.done() and not engines.cancelled() and engines.exception() is None:
            settle(None)

    if engines is not None:
        engines.add_done_callback(of_engines)
    own.add_done_callback(of_own)
    return result
