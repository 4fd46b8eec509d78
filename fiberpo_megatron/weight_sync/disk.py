"""This module publishes through a safetensors folder that every engine can read."""

import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fiberpo_megatron import durable
from fiberpo_megatron.weight_sync.base import Deadline, LeaderPublisher, PublisherContext, Weights

SHARD_BYTES = 4 * 1024**3
MARKER = ".published"
"""This file marks the folders that a publisher wrote and may remove; it holds the run folder of the publisher's run.
(Earlier versions left it empty.)"""
CONFIGURATION_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
"""Files that an engine reads beside the weights. Code of a model folder is not among them: no engine runs it."""


class DiskPublisher(LeaderPublisher):
    """Writes <folder>/<version>/ in one move, has every engine load it, and removes older versions.

    `folder` must be readable by every engine; by default it is <run folder>/published. Configuration and tokenizer
    files are copied from the model's folder. `shard_bytes` is about the size of one safetensors file. Several runs may
    share a folder as long as their versions differ: none removes what another one published.
    """

    def __init__(
        self, context: PublisherContext, folder: str | Path | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        super().__init__(context)
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes = {shard_bytes} must be at least 1")
        self.folder = Path(folder or context.run_folder / "published").resolve()
        self.shard_bytes = shard_bytes
        run = context.run_folder.resolve()
        self._run, self._alone = str(run), self.folder.is_relative_to(run)

    def send(self, weights: Weights, version: str, deadline: Deadline) -> None:
        """Write the folder and have the engines load it."""
        with durable.explained(self.folder):
            written = self._write(weights, version)
        with self.paused():
            self.engines.on_all(lambda client: client.update_weights_from_disk(written, version, deadline.left()))
        with durable.explained(self.folder):
            for old in self.folder.iterdir():
                if old != written and self._is_ours(old):
                    _remove(old)

    def _is_ours(self, folder: Path) -> bool:
        """Return whether this run published a folder. What lies in the run folder is its own, also after a move."""
        marker = folder / MARKER
        if folder.is_symlink() or not marker.is_file():
            return False
        return self._alone or marker.read_text() in (self._run, "")

    def _write(self, weights: Weights, version: str) -> Path:
        """Write the complete folder of this version and return its path."""
        final, partial = self.folder / version, self.folder / f"{version}.partial"
        for stale in (final, partial):
            if not stale.exists():
                continue
            empty = stale.is_dir() and not any(stale.iterdir())  # making or removing it was cut short
            if not empty and not self._is_ours(stale):
                raise FileExistsError(f"{stale} was not published by this run; change weight_sync.folder")
            _remove(stale)
        partial.mkdir(parents=True)
        (partial / MARKER).write_text(self._run)
        copy_configuration(self.context.model, partial)
        write_shards(weights, partial, self.shard_bytes)
        os.replace(partial, final)  # not synced: a run publishes again after its machine was lost
        return final


def _remove(folder: Path) -> None:
    """Delete a published folder, its marker last: what is left when that fails is known as this run's."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def copy_configuration(model: Path, folder: Path) -> None:
    """Copy config.json, tokenizer files and similar ones, which an engine reads beside the weights."""
    for source in model.iterdir():
        if source.is_file() and source.suffix in CONFIGURATION_SUFFIXES and not source.name.endswith(".index.json"):
            shutil.copyfile(source, folder / source.name)


def save_readable(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode that the umask gives.

    safetensors itself makes a file that only its owner can read, and an engine may run as another user. Raises OSError
    for what safetensors reports of the file system (a full disk), in an error of its own.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
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
