"""This module makes the groups of a step beside whatever the process does meanwhile."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import CancelledError, wait
from contextlib import suppress
from queue import Empty, SimpleQueue

from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.types import Prompt, RolloutGroup

STOP_POLL_S = 0.5
"""How often a request to stop is looked for while no group ends."""
Make = Callable[[int, Prompt], Awaitable[RolloutGroup]]
"""(a prompt's index in the step, the prompt) -> its scored trajectories."""
Keep = Callable[[int, RolloutGroup], None]


class Groups:
    """These are the groups of one step that are being made on `loop`; they begin at once, all at the same time.

    prompts: those to be made, by their index in the step. keep: is called with each group as soon as it has ended, in
    the loop's thread. Cancel it when it is no longer wanted.
    """

    def __init__(
        self, loop: BackgroundLoop, make: Make, prompts: Mapping[int, Prompt], keep: Keep | None = None
    ) -> None:
        self._make, self._keep = make, keep
        self._keeping, self._cancelled = threading.Lock(), False
        self._came: SimpleQueue[tuple[int, RolloutGroup] | None] = SimpleQueue()  # None: there is no more
        self._work = loop.submit(self._all(dict(prompts)))
        self._work.add_done_callback(lambda _: self._came.put(None))

    async def _all(self, prompts: Mapping[int, Prompt]) -> None:
        async def one(index: int, prompt: Prompt) -> None:
            group = await self._make(index, prompt)
            with self._keeping:  # without a wait in between: a failure of another group cancels nothing that has ended
                if self._keep is not None and not self._cancelled:
                    self._keep(index, group)
            self._came.put((index, group))

        async with asyncio.TaskGroup() as tasks:
            for index, prompt in prompts.items():
                tasks.create_task(one(index, prompt))

    def finished(self, stop: Callable[[], bool]) -> Iterator[tuple[int, RolloutGroup]]:
        """Yield pairs (index, group), each prompt once, as they end; fewer where `stop` says so before the last ended,
        or where they were cancelled.

        Raises what the making of a group raised.
        """
        while True:  # not for ever: every request and every environment has its deadline
            try:
                item = self._came.get(timeout=0 if stop() else STOP_POLL_S)
            except Empty:
                if stop():
                    return
                continue
            if item is None:
                break
            yield item
        self._raise()

    def ended(self) -> list[tuple[int, RolloutGroup]]:
        """Return pairs (index, group) of what has ended since the last call, without a wait.

        Raises what the making of a group raised.
        """
        failed = self._work.done()  # asked first: what has ended before a failure is in the queue by now
        found: list[tuple[int, RolloutGroup]] = []
        with suppress(Empty):
            while True:
                item = self._came.get_nowait()
                if item is not None:
                    found.append(item)
        if failed:
            self._raise()
        return found

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Wait until all groups have ended, and return True; False where `stop` says so before. It takes none of them.

        Raises what the making of a group raised.
        """
        while not wait([self._work], timeout=0 if stop() else STOP_POLL_S).done:
            if stop():
                return False
        self._raise()
        return True

    def cancel(self) -> None:
        """Stop making groups; idempotent. What has been kept stays, and nothing is kept once this has returned."""
        with self._keeping:
            self._cancelled = True
        self._work.cancel()

    def _raise(self) -> None:
        if self._cancelled:
            return
        try:
            self._work.result()
        except BaseExceptionGroup as errors:
            raise _first(errors) from None


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error that is not the cancellation of another."""
    found: list[BaseException] = []
    for error in errors.exceptions:
        found.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((e for e in found if not isinstance(e, (asyncio.CancelledError, CancelledError))), found[0])
