"""A trainer rank for test_real_engine.py; apart, so that the spawned process imports little."""

from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from tests.weight_sync.sources import Tensors, context


def publish_as_rank(rank: int, folder: str, engine: EngineAddress, checkpoint: Path) -> None:
    """Publish <folder>/weights.pt twice, in a process that has a default group of its own, as under Megatron."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def gathered():
        for name, tensor in torch.load(f"{folder}/weights.pt"):
            dist.broadcast(tensor, src=0)  # gathering is collective: every rank must iterate to the end
            yield name, tensor if rank == 0 else torch.empty(0)

    with EnginePool([engine], timeout_s=30) as pool:
        given = context(pool, checkpoint, Path(folder), rank, 2)
        with closing(DistributedPublisher(given, bucket_mib=1, backend="gloo")) as publishing:
            publishing.publish(Tensors(gathered()), "1")
            publishing.publish(Tensors(gathered()), "2")
    dist.barrier()
    dist.destroy_process_group()
