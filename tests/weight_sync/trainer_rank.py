"""Trainer ranks for test_real_engine.py; apart, so that spawned processes import little."""

import asyncio
import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.weight_sync.base import PublisherContext
from fiberpo_megatron.weight_sync.disk import DiskPublisher
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from fiberpo_megatron.weight_sync.ipc import IpcPublisher
from fiberpo_megatron.weight_sync.rounds import RoundPublisher
from tests.weight_sync.sources import Tensors, context


def made_publisher(method: str, given: PublisherContext) -> RoundPublisher:
    """Return a publisher that needs several rounds for the tiny model."""
    made: RoundPublisher
    if method == "disk":
        made = DiskPublisher(given)
    elif method == "delta":
        made = DiskPublisher(given, delta=True)
    elif method == "ipc":
        made = IpcPublisher(given)
    else:
        made = DistributedPublisher(given, backend="gloo")
    made.limit = 60_000
    return made


def publish_as_rank(rank: int, method: str, folder: str, engine: EngineAddress, checkpoint: Path) -> None:
    """Publish <folder>/weights twice, in a process that has a default group of its own, as under Megatron."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tensors = load_file(f"{folder}/weights")
    with (
        EnginePool([engine], timeout_s=30) as pool,
        closing(made_publisher(method, context(pool, checkpoint, Path(folder), rank, 2))) as publishing,
    ):
        publishing.publish(Tensors(tensors.items(), rank, 2), "1")
        publishing.publish(Tensors(tensors.items(), rank, 2), "2")
    dist.barrier()
    dist.destroy_process_group()


def publish_as_its_scheduler_dies(
    rank: int, folder: str, engine: EngineAddress, checkpoint: Path, scheduler: int
) -> None:
    """Publish by broadcasts from two ranks. Rank 0 kills the engine's process `scheduler` before the third round. Write
    the seconds until this rank's error, and the error, to <folder>/error-<rank>."""

    class Kills(Tensors):
        began = 0.0

        def share(self, limit):
            for number, tensors in enumerate(super().share(limit)):
                if number == 2:
                    self.began = time.monotonic()
                    if rank == 0:
                        os.kill(scheduler, signal.SIGKILL)
                yield tensors

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    source = Kills(load_file(checkpoint / "model.safetensors").items(), rank, 2)
    with (
        EnginePool([engine], timeout_s=30) as pool,
        closing(made_publisher("distributed", context(pool, checkpoint, Path(folder), rank, 2, timeout_s=120))) as made,
    ):
        try:
            made.publish(source, "1")
        except Exception as error:
            lines = [f"{time.monotonic() - source.began}", f"{type(error).__name__}: {error}"]
            Path(folder, f"error-{rank}").write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def publish_and_die(method: str, engine: EngineAddress, checkpoint: Path, folder: Path, stage: str = "round") -> None:
    """Begin to publish zeros as "killed", and be killed at a stage of it:

    - beginning: before the first round;
    - round: when the engine has taken the first of several rounds ("delta": when differences are being written);
    - commit: when the engine has taken all rounds, and does not generate yet ("delta": when all are written);
    - loading: while the engine loads differences.

    With "delta", ones were published before as "first".
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Kills(Tensors):
        def share(self, limit):
            for number, tensors in enumerate(super().share(limit)):
                if stage == "beginning":
                    die()
                if number == 2 and stage == "round":
                    deadline = time.monotonic() + 30
                    while method != "delta" and (
                        pool.run(pool.clients[0].model_info()).weight_version != "incomplete-killed"
                    ):
                        assert time.monotonic() < deadline, "the engine did not take the first round within 30 s"
                        time.sleep(0.1)
                    die()
                yield tensors

    torch.set_num_threads(1)
    shapes = load_file(checkpoint / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in shapes.items()}
    with EnginePool([engine], timeout_s=30) as pool:
        publishing = made_publisher(method, context(pool, checkpoint, folder))
        if method == "delta":
            publishing.publish(Tensors((name, torch.ones_like(tensor)) for name, tensor in shapes.items()), "first")
        if stage == "commit":
            publishing.finish = lambda version, deadline: die()  # type: ignore[method-assign]
        if stage == "loading":
            client = pool.clients[0]
            load = client.update_weights_from_disk

            async def load_and_die(*arguments: Any) -> None:
                loading = asyncio.ensure_future(load(*arguments))
                await asyncio.wait([loading], timeout=0.02)
                die()

            client.update_weights_from_disk = load_and_die  # type: ignore[method-assign]
        publishing.publish(Kills(zeros.items()), "killed")
