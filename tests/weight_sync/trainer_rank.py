"""A trainer rank for test_real_engine.py; apart, so that the spawned process imports little."""

from pathlib import Path

import torch
import torch.distributed as dist

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher


def publish_as_rank(rank: int, folder: str, engine: EngineAddress, checkpoint: Path) -> None:
    """Publish <folder>/weights.pt twice, in a process that has a default group of its own, as under Megatron."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def gathered():
        for name, tensor in torch.load(f"{folder}/weights.pt"):
            dist.broadcast(tensor, src=0)  # gathering is collective: every rank must iterate to the end
            yield name, tensor if rank == 0 else torch.empty(0)

    with DistributedPublisher(
        [engine], model=checkpoint, leader=rank == 0, timeout_s=30, bucket_mib=1, backend="gloo"
    ) as publishing:
        publishing.publish(gathered(), "1")
        publishing.publish(gathered(), "2")
    dist.barrier()
    dist.destroy_process_group()
