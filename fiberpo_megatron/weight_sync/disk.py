"""Publishing through a safetensors folder that every engine can read."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx
from safetensors.torch import save_file
from torch import Tensor

from fiberpo_megatron.engines.client import EngineAddress
from fiberpo_megatron.weight_sync.base import Deadline, Publisher, Weights

SHARD_BYTES = 4 * 1024**3
MARKER = ".published"
"""Marks folders that were written here and may be removed again."""
CONFIGURATION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py"}


class DiskPublisher(Publisher):
    """Writes <folder>/<version>/ in one move, has every engine load it, and removes older versions.

    Configuration and tokenizer files are copied from `model`. `shard_bytes`: size of one
    safetensors file.
    """

    def __init__(
        self,
        engines: Sequence[EngineAddress],
        *,
        model: Path,
        folder: Path,
        leader: bool,
        timeout_s: float,
        shard_bytes: int = SHARD_BYTES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(engines, model=model, leader=leader, timeout_s=timeout_s, transport=transport)
        self.model, self.folder, self.shard_bytes = model, folder.resolve(), shard_bytes

    def _send(self, weights: Weights, version: str, deadline: Deadline) -> None:
        written = self._write(weights, version)
        with self._paused():
            self._on_all(lambda client: client.update_weights_from_disk(written, version, deadline.left()))
        for old in self.folder.iterdir():
            if old != written and (old / MARKER).exists():
                shutil.rmtree(old)

    def _write(self, weights: Weights, version: str) -> Path:
        """The complete folder of this version."""
        final, partial = self.folder / version, self.folder / f"{version}.partial"
        for stale in (final, partial):
            if stale.exists() and not (stale / MARKER).exists():
                raise FileExistsError(f"{stale} was not written by a publication; change weight_sync.folder")
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / MARKER).touch()
        for source in self.model.iterdir():
            if source.suffix in CONFIGURATION_SUFFIXES and not source.name.endswith(".index.json"):
                shutil.copyfile(source, partial / source.name)
        write_shards(weights, partial, self.shard_bytes)
        os.replace(partial, final)
        return final


def save_readable(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file with the mode that the umask gives: safetensors itself makes one that only its owner reads,
    and an engine may run as another user."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_shards(weights: Weights, folder: Path, shard_bytes: int) -> None:
    """Safetensors files of about `shard_bytes` and the index that Hugging Face loaders read."""
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
