"""This module holds the base classes of publishers, which carry the weights to the engines.

A way of your own to carry weights is one class in a file of yours. This one hands every rank's own part to the engines
through a shared folder:

    from fiberpo_megatron.weight_sync.base import Publisher, PublisherContext

    class PerRankFiles(Publisher):
        '''Every rank writes its part, and rank 0 has the engines load the parts.'''

        def __init__(self, context: PublisherContext, folder: str) -> None:
            super().__init__(context)
            self.folder = Path(folder)

        def publish(self, source, version):
            save_file({shard.name: shard.tensor for shard in source.local()}, self.folder / f"{self.context.rank}")
            torch.distributed.barrier()
            if self.context.rank == 0:
                with self.paused():
                    ...  # self.engines has the addresses and clients
                self.check_version(version)

The config names it by its import path, and `options` are the arguments after `context`:

    [weight_sync]
    method = {use = "my_package.per_rank:PerRankFiles", options = {folder = "/dev/shm/weights"}}
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fiberpo_megatron.engines.errors import EngineError
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.interfaces import WeightSource


class Deadline:
    """This is a point in time that several waits share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds until then. It is never quite 0, so that a wait with it fails by its own rules."""
        return max(self._end - time.monotonic(), 0.001)

    def passed(self) -> bool:
        """Return whether it lies in the past."""
        return time.monotonic() >= self._end


@dataclass(frozen=True)
class PublisherContext:
    """Holds what a run gives to its publisher."""

    engines: EnginePool
    """The engines, with their clients and the thread for the network. A publisher must not close the pool."""
    model: Path
    """Hugging Face folder of the model: config.json, tokenizer, and the names and shapes that tensors must have."""
    rank: int
    """This process among `world_size` training ranks. Each constructs a publisher and calls `publish`."""
    world_size: int
    run_folder: Path
    """Folder of the run, the same on all ranks."""
    timeout_s: float
    """Seconds that one publication may take (`weight_sync.timeout_s`)."""


class Publisher(ABC):
    """Carries weights to all engines of a run. Subclass it for a way of your own; the module's docstring shows how.

    Every rank constructs one with the context, followed by the options of the config as keywords.
    """

    def __init__(self, context: PublisherContext) -> None:
        self.context = context
        self.engines = context.engines

    @abstractmethod
    def publish(self, source: WeightSource, version: str) -> None:
        """Load the weights of `source` into every engine as `version`. Every rank calls it.

        `source.full()` is collective: a rank that begins it must iterate to the end, even after an error.
        `source.local()` yields the shards that this rank holds, without communication. When this returns on rank 0,
        every engine must sample with the new weights and report `version`. Raise an error that names the engine.
        """

    def close(self) -> None:  # noqa: B027 - a publisher may have nothing to release
        """Release what the publisher made. A second call must do nothing. The default releases nothing."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep all engines from generating in the block. Their running requests are put back into the queue and go on
        afterwards, with the new weights."""
        self.engines.on_all(lambda client: client.pause("retract"))
        try:
            yield
        except BaseException:
            with suppress(EngineError):  # the first error is the one to raise
                self.engines.on_all(lambda client: client.resume())
            raise
        self.engines.on_all(lambda client: client.resume())

    def check_version(self, version: str) -> None:
        """Raise EngineError when an engine does not report `version` as that of its weights."""
        for client, info in zip(self.engines.clients, self.engines.on_all(lambda client: client.model_info())):
            if info.weight_version != version:
                raise EngineError(
                    client.url,
                    f"weights {version!r} were published, but it reports weights {info.weight_version!r}",
                    "Check that no other run publishes to it",
                    client.address.log,
                )

    def check_alike(self, timeout_s: float) -> list[str]:
        """Return the checksum of the weights that each engine holds.

        Raises EngineError when engines with the same number of tensor-parallel ranks hold different weights.
        """
        found = self.engines.on_all(lambda client: client.checksum(timeout_s))
        first: dict[int, int] = {}
        for number, (client, checksum) in enumerate(zip(self.engines.clients, found)):
            other = first.setdefault(checksum.count("-"), number)
            if checksum != found[other]:
                raise EngineError(
                    client.url,
                    f"it holds weights with checksum {checksum}, but {self.engines.clients[other].url} holds weights "
                    f"with checksum {found[other]} after the same publication",
                    "Check that no other run publishes to one of them, and that both run the same SGLang",
                    client.address.log,
                )
        return found
