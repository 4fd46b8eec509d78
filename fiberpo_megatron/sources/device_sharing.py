"""This module decides who has the devices' memory when engines share the training ranks' GPUs: they take turns."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from fiberpo_megatron.interfaces import Policy
from fiberpo_megatron.together import together

KV_CACHE, WEIGHTS = "kv_cache", "weights"


class DeviceSharing(Protocol):
    """It gives the devices' memory to the engines, except inside `training`."""

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        """Make optimiser steps and saves possible inside. `publishes` says that the engines get weights before they
        generate again, so that they need not keep theirs."""
        ...


class SeparateDevices:
    """Engines and training ranks have GPUs of their own, so that there is nothing to do."""

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        return nullcontext()


class EngineMemory(Protocol):
    """It is the memory of all engines; `engines.pool.EnginePool` implements it."""

    def release_memory(self, tags: Sequence[str]) -> None: ...

    def resume_memory(self, tags: Sequence[str]) -> None: ...


class SharedDevices:
    """The policy's memory is released from now on, except inside `training`, where the engines' is.

    Every rank makes one before the engines start and calls it; rank 0 talks to the engines.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._engines: EngineMemory | None = None
        policy.release_memory()
        policy.layout.barrier()  # an engine that starts measures the memory that is free

    def attach(self, engines: EngineMemory) -> None:
        """Take the engines, once they run."""
        self._engines = engines

    @contextmanager
    def training(self, *, publishes: bool) -> Iterator[None]:
        assert self._engines is not None, "the engines were attached when they had started"
        layout = self._policy.layout
        tags = (KV_CACHE, WEIGHTS) if publishes else (KV_CACHE,)
        with together(layout, "releasing the engines' memory"):
            if layout.rank == 0:
                self._engines.release_memory(tags)
        self._policy.restore_memory()
        yield
        self._policy.release_memory()
        layout.barrier()  # every rank's memory is free before an engine takes it
        with together(layout, "giving the engines their memory back"):
            if layout.rank == 0:
                self._engines.resume_memory(tags)
