"""A publisher as a user of the package writes one: every rank hands over its own shards, no tensor is gathered."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.interfaces import WeightSource
from fiberpo_megatron.weight_sync.base import Publisher, PublisherContext
from fiberpo_megatron.weight_sync.choose import make_publisher


class PerRankFiles(Publisher):
    """Every rank writes its shards to a file; rank 0 puts them together and has the engines load the result."""

    def __init__(self, context: PublisherContext, folder: str = "shards") -> None:
        super().__init__(context)
        self.folder = context.run_folder / folder
        if context.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def publish(self, source: WeightSource, version: str) -> None:
        dist.barrier()  # the folder exists
        tensors, places = {}, {}
        for shard in source.local():
            tensors[shard.name] = shard.tensor.contiguous().clone()
            places[shard.name] = [shard.shape, shard.offset]
        save_file(tensors, self.folder / f"rank-{self.context.rank}.shard", {"places": json.dumps(places)})
        dist.barrier()  # all files are written
        if self.context.rank == 0:
            written = self._joined(version)
            with self.paused():
                self.engines.on_all(
                    lambda client: client.update_weights_from_disk(written, version, self.context.timeout_s)
                )
            self.check_version(version)

    def _joined(self, version: str) -> Path:
        whole: dict[str, torch.Tensor] = {}
        covered: dict[str, torch.Tensor] = {}
        for rank in range(self.context.world_size):
            with safe_open(self.folder / f"rank-{rank}.shard", framework="pt") as file:
                for name, (shape, offset) in json.loads(file.metadata()["places"]).items():
                    part = file.get_tensor(name)
                    at = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
                    whole.setdefault(name, torch.empty(shape, dtype=part.dtype))[at] = part
                    covered.setdefault(name, torch.zeros(shape, dtype=torch.bool))[at] = True
        gaps = [name for name, seen in covered.items() if not seen.all()]
        assert not gaps, f"no rank has all of {gaps}"
        folder = self.folder / version
        folder.mkdir()
        for file in self.context.model.glob("*.json"):
            shutil.copy(file, folder)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
        return folder.resolve()


OWN = {"use": f"{__name__}:PerRankFiles", "options": {"folder": "parts"}}


def publish_from_megatron(
    method: str | dict[str, object], parallel: dict[str, int], engine: EngineAddress, model: Path, run_folder: Path
) -> None:
    """Load `model` into two Megatron ranks and publish it as a run would."""
    from fiberpo_megatron.mcore.families import read_hf_config
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from tests.distributed.parity import make_config

    config = make_config(
        parallel=parallel,
        model={"path": model, "random_init": False},
        run={"folder": run_folder},
        weight_sync={"method": method},
    )
    hf_config = read_hf_config(model)
    layout = start_layout(hf_config, config.parallel, config.run)
    policy = build_policy(config, hf_config, layout)
    with (
        EnginePool([engine], timeout_s=30) as pool,
        closing(make_publisher(config, pool, layout.rank, layout.world_size)) as publisher,
    ):
        publisher.publish(policy.weights, "1")
