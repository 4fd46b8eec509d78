"""What all ways of publishing share: who talks to the engines, the pause around an update, the checks."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from torch import Tensor

from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.engines.client import EngineAddress, EngineClient
from fiberpo_megatron.engines.errors import EngineError
from fiberpo_megatron.weight_sync.manifest import Manifest

Weights = Iterator[tuple[str, Tensor]]
"""Hugging Face names and full tensors. Every rank iterates it to the end (gathering a tensor is collective);
only rank 0 gets tensors that are not empty."""

Result = TypeVar("Result")
Call = Callable[[EngineClient], Awaitable[Result]]


class Deadline:
    """A point in time that several waits share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; never quite 0, so that a wait with it fails by its own rules."""
        return max(self._end - time.monotonic(), 0.001)


class Publisher(ABC):
    """Publishes weights to all engines. Every rank calls `publish`; only the leader (rank 0) talks to them.

    `model`: Hugging Face folder whose tensors a publication must have. `timeout_s`: bound of one publication.
    `transport`: the network seam for tests.
    """

    def __init__(
        self,
        engines: Sequence[EngineAddress],
        *,
        model: Path,
        leader: bool,
        timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if leader and not engines:
            raise ValueError("no engines to publish to; give rollout.engine.urls or let the run start some")
        self.leader, self.timeout_s = leader, timeout_s
        self.clients = [EngineClient(e, timeout_s, transport=transport) for e in engines] if leader else []
        self._manifest = Manifest(model) if leader else None
        self._loop = BackgroundLoop("weight-sync") if leader else None

    def publish(self, weights: Weights, version: str) -> None:
        """Load `weights` into every engine as `version`; running requests go on with the new weights.

        Raises EngineError naming the engine, ValueError for weights that are not the model's. The weights
        are drained on every rank in any case, so that no rank waits in a gather for one that failed.
        """
        try:
            if self._manifest is not None:
                self._send(self._manifest.checked(weights), version, Deadline(self.timeout_s))
                self._check_version(version)
        finally:
            for _ in weights:
                pass

    @abstractmethod
    def _send(self, weights: Weights, version: str, deadline: Deadline) -> None:
        """The leader's part."""

    def close(self) -> None:
        """Release connections and threads; idempotent."""
        if self._loop is not None:
            self._on_all(lambda client: client.close())
            self._loop.close()
            self._loop = None

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """No engine generates inside; running requests are put back into the queue and go on afterwards."""
        self._on_all(lambda client: client.pause("retract"))
        try:
            yield
        except BaseException:
            with suppress(EngineError):  # the first error is the one to raise
                self._on_all(lambda client: client.resume())
            raise
        self._on_all(lambda client: client.resume())

    def _check_version(self, version: str) -> None:
        """Every engine must now name `version`."""
        for client, info in zip(self.clients, self._on_all(lambda client: client.model_info())):
            if info.weight_version != version:
                raise EngineError(
                    client.url,
                    f"weights {version!r} were published, but it reports weights {info.weight_version!r}",
                    "Check that nobody else publishes to it",
                    client.address.log,
                )

    def _on_all(self, call: Call[Result]) -> list[Result]:
        """The call's result from every engine; the first error is raised when all have answered."""

        async def all_engines() -> list[Result]:
            found = await asyncio.gather(*(call(c) for c in self.clients), return_exceptions=True)
            return [_raised(item) for item in found]

        return self._submit(all_engines()).result()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Start `work` in the network thread."""
        assert self._loop is not None, "only the leader talks to engines, and only until close()"
        return self._loop.submit(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _raised(item: Result | BaseException) -> Result:
    if isinstance(item, BaseException):
        raise item
    return item
