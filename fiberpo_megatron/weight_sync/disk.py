"""This module publishes through a safetensors folder that every engine can read."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fiberpo_megatron.weight_sync.base import Deadline, LeaderPublisher, PublisherContext, Weights

SHARD_BYTES = 4 * 1024**3
MARKER = ".published"
"""This file marks the folders that a publisher wrote and may remove."""
CONFIGURATION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py"}


class DiskPublisher(LeaderPublisher):
    """Writes <folder>/<version>/ in one move, has every engine load it, and removes older versions.

    `folder` must be readable by every engine; by default it is <run folder>/published. Configuration and tokenizer
    files are copied from the model's folder. `shard_bytes` is about the size of one safetensors file.
    """

    def __init__(
        self, context: PublisherContext, folder: str | Path | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        super().__init__(context)
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes = {shard_bytes} must be at least 1")
        self.folder = Path(folder or context.run_folder / "published").resolve()
        self.shard_bytes = shard_bytes

    def send(self, weights: Weights, version: str, deadline: Deadline) -> None:
        """Write the folder and have the engines load it."""
        written = self._write(weights, version)
        with self.paused():
            self.engines.on_all(lambda client: client.update_weights_from_disk(written, version, deadline.left()))
        for old in self.folder.iterdir():
            if old != written and (old / MARKER).exists():
                shutil.rmtree(old)

    def _write(self, weights: Weights, version: str) -> Path:
        """Write the complete folder of this version and return its path."""
        final, partial = self.folder / version, self.folder / f"{version}.partial"
        for stale in (final, partial):
            if stale.exists() and not (stale / MARKER).exists():
                raise FileExistsError(f"{stale} was not written by a publication; change weight_sync.folder")
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / MARKER).touch()
        copy_configuration(self.context.model, partial)
        write_shards(weights, partial, self.shard_bytes)
        os.replace(partial, final)
        return final


def copy_configuration(model: Path, folder: Path) -> None:
    """Copy config.json, tokenizer files and similar ones, which an engine reads beside the weights."""
    for source in model.iterdir():
        if source.suffix in CONFIGURATION_SUFFIXES and not source.name.endswith(".index.json"):
            shutil.copyfile(source, folder / source.name)


def save_readable(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode that the umask gives.

    safetensors itself makes a file that only its owner can read, and an engine may run as another user.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_shards(weights: Weights, folder: Path, shard_bytes: int) -> None:
    """Write safetensors files of about `shard_bytes` each, and the index that Hugging Face loaders read."""
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = size = 0

    def finish() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_readable(shard, folder / name)
        places.update(dict.fromkeys(shard, name))

    for name, tensor in weights:
        if shard and size + tensor.nbytes > shard_bytes:
            finish()
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    if shard:
        finish()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
