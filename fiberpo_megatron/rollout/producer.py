"""This module makes the groups of a step beside whatever the process does meanwhile."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future

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
        self._loop, self._make, self._keep = loop, make, keep
        self._keeping, self._cancelled = threading.Lock(), False
        self._coming, self._came, self._over = threading.Lock(), list[tuple[int, RolloutGroup]](), False
        self.news: Future[None] = Future()
        """It is done once a group has ended, or all have, since the last call of `ended`; then it is another one."""
        self._work = loop.submit(self._all(dict(prompts)))
        self._work.add_done_callback(lambda _: self._come([], over=True))

    async def _all(self, prompts: Mapping[int, Prompt]) -> None:
        async def one(index: int, prompt: Prompt) -> None:
            group = await self._make(index, prompt)
            with self._keeping:  # without a wait in between: a failure of another group cancels nothing that has ended
                if self._keep is not None and not self._cancelled:
                    self._keep(index, group)
            self._come([(index, group)])

        async with asyncio.TaskGroup() as tasks:
            for index, prompt in prompts.items():
                tasks.create_task(one(index, prompt))

    def finished(self, stop: Callable[[], bool]) -> Iterator[tuple[int, RolloutGroup]]:
        """Yield pairs (index, group), each prompt once, as they end; fewer where `stop` says so before the last ended,
        or where they were cancelled.

        Raises what the making of a group raised.
        """
        while True:  # not for ever: every request and every environment has its deadline
            found, over = self._taken()
            yield from found
            if over:
                break
            stopping = stop()
            if not self._loop.wait([self.news], 0 if stopping else STOP_POLL_S) and stopping:
                return
        self._raise()

    def ended(self) -> list[tuple[int, RolloutGroup]]:
        """Return pairs (index, group) of what has ended since the last call, without a wait.

        Raises what the making of a group raised.
        """
        found, over = self._taken()
        if over:
            self._raise()
        return found

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Wait until all groups have ended, and return True; False where `stop` says so before. It takes none of them.

        Raises what the making of a group raised.
        """
        while not self._work.done():
            stopping = stop()
            if not self._loop.wait([self._work], 0 if stopping else STOP_POLL_S) and stopping:
                return False
        self._raise()
        return True

    def cancel(self) -> None:
        """Stop making groups; idempotent. What has been kept stays, and nothing is kept once this has returned."""
        with self._keeping:
            self._cancelled = True
        self._work.cancel()

    def _come(self, ended: list[tuple[int, RolloutGroup]], over: bool = False) -> None:
        with self._coming:
            self._came += ended
            self._over = self._over or over
            if not self.news.done():
                self.news.set_result(None)

    def _taken(self) -> tuple[list[tuple[int, RolloutGroup]], bool]:
        """Return what has ended since the last call, and whether nothing more will."""
        with self._coming:
            found, self._came = self._came, []
            if self.news.done():
                self.news = Future()
            return found, self._over

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
