"""Trainer ranks for test_real_engine.py; apart, so that spawned processes import little."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

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


def publish_and_die(method: str, engine: EngineAddress, checkpoint: Path, folder: Path) -> None:
    """Begin to publish zeros, and be killed when the engine has taken the first of several rounds."""

    class Kills(Tensors):
        def share(self, limit):
            for number, tensors in enumerate(super().share(limit)):
                if number == 2:
                    deadline = time.monotonic() + 30
                    while pool.run(pool.clients[0].model_info()).weight_version != "incomplete-killed":
                        assert time.monotonic() < deadline, "the engine did not take the first round within 30 s"
                        time.sleep(0.1)
                    os.kill(os.getpid(), signal.SIGKILL)
                yield tensors

    torch.set_num_threads(1)
    shapes = load_file(checkpoint / "model.safetensors")
    with EnginePool([engine], timeout_s=30) as pool:
        publishing = made_publisher(method, context(pool, checkpoint, folder))
        publishing.publish(Kills((name, torch.zeros_like(tensor)) for name, tensor in shapes.items()), "killed")
