"""This module takes unfinished trajectories over from one version of the weights to the next."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol

from fiberpo_megatron.engines.connection import CONTROL_TIMEOUT_S
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.together import together

Partial = Literal["drain", "retract", "segment"]
CUT_S = 2 * CONTROL_TIMEOUT_S
"""Seconds within which what is cut short comes back. An engine that does not even answer the abort is given up
before."""


class Traffic(Protocol):
    """These are a leader's requests to the engines; `rollout.sampler.EngineSampler` implements it."""

    def hold(self) -> None:
        """Send nothing more until `release`; what is aborted meanwhile keeps its tokens and goes on behind them."""
        ...

    def cut_short(self, deadline_s: float) -> None:
        """Abort what is in flight, and wait until it has come back. Raises TimeoutError after `deadline_s` (s)."""
        ...

    def release(self) -> None:
        """Send requests again."""
        ...


class Handover(Protocol):
    """It says what happens to unfinished trajectories when the weights change. Every rank calls it."""

    def publication(self) -> AbstractContextManager[None]:
        """Make a publication possible inside."""
        ...

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        """Keep the engines idle inside, where they share devices with the trainer; with `publishes` they stay so until
        the publication."""
        ...


class AllEnded:
    """A publication waits until all admitted trajectories have ended (`drain`): each has one version."""

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain

    @contextmanager
    def publication(self) -> Iterator[None]:
        self._drain()
        yield

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        return nullcontext()


class GoesOn:
    """Requests go on inside the engines (`retract`): every publisher pauses them, and they continue with the new
    weights, which read the earlier tokens again. In the synchronous loop there are none."""

    def publication(self) -> AbstractContextManager[None]:
        return nullcontext()

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        return nullcontext()


class CutShort:
    """All requests are aborted (`segment`): each response keeps the tokens that it has, and a further request goes on
    behind them, with the new weights, on any engine.

    `traffic`: this rank's requests; None on ranks that have none. `unfinished`: whether there may be any, on any rank.
    `shared`: whether engines and trainer share devices.
    """

    def __init__(
        self,
        layout: Layout,
        traffic: Traffic | None,
        unfinished: Callable[[], bool],
        timeout_s: float,
        shared: bool = False,
    ) -> None:
        self._layout, self._traffic, self._unfinished = layout, traffic, unfinished
        self._timeout_s, self._shared = timeout_s, shared
        self._held = False

    @contextmanager
    def publication(self) -> Iterator[None]:
        self._hold()
        yield
        self._release()

    @contextmanager
    def training(self, *, publishes: bool) -> Iterator[None]:
        if not self._shared:
            yield
            return
        self._hold()
        yield
        if not publishes:
            self._release()

    def _hold(self) -> None:
        if self._held or not self._unfinished():
            return
        self._held = True
        with together(self._layout, "holding back requests to the engines"):
            if self._traffic is not None:
                self._traffic.hold()
        with together(self._layout, "cutting responses short", 2 * self._timeout_s):
            if self._traffic is not None:  # every leader's requests are held, so that an abort may end all of them
                self._traffic.cut_short(self._timeout_s)

    def _release(self) -> None:
        if not self._held:
            return
        self._held = False
        with together(self._layout, "sending requests again"):
            if self._traffic is not None:
                self._traffic.release()
