"""Safetensors folders in Hugging Face's form: reading parts of tensors, and writing shards with an index."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fiberpo_megatron.mcore.weight_tables import Family, match_name
from fiberpo_megatron.mcore.weights_transforms import Dimensions, Shape

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: a file's tensor, or one expert's rows of a stacked one."""

    file: str
    tensor: str
    shape: Shape
    expert: int | None = None
    first_row: int = 0


class HfFiles:
    """The tensors of a folder. Files are mapped into memory and only the asked parts are touched.

    Raises FileNotFoundError when there are no weights, ValueError for a file that cannot be read.
    """

    def __init__(self, folder: Path, family: Family, dims: Dimensions) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        for file, tensor in self._listed():
            self._add(file, tensor, family, dims)

    @property
    def names(self) -> Iterable[str]:
        """Per-expert names, whatever the files hold."""
        return self._places.keys()

    def shape(self, name: str) -> Shape:
        return self._places[name].shape

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of `name` along `dim`; the whole tensor when `stop` is None."""
        place = self._places[name]
        stop = place.shape[dim] if stop is None else stop
        window = [slice(0, size) for size in place.shape]
        window[dim] = slice(start, stop)
        rows = window[0]
        window[0] = slice(rows.start + place.first_row, rows.stop + place.first_row)
        with self._reading(place.file):
            stored = self._file(place.file).get_slice(place.tensor)
            if start == stop:  # a vocabulary shard that is all padding
                kept = place.shape[:dim] + (0,) + place.shape[dim + 1 :]
                return stored[0:1].new_empty(kept)
            return stored[tuple(window)] if place.expert is None else stored[(place.expert, *window)]

    def _listed(self) -> Iterator[tuple[str, str]]:
        """(file, tensor) pairs from the index, else from the single file."""
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not a safetensors index ({error!r}); download the model again") from error
            yield from ((file, name) for name, file in weight_map.items())
            return
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{self.folder} holds {len(files)} .safetensors files and no {INDEX_NAME}; expected "
                f"{SINGLE_NAME}, or several files with their index"
            )
        with self._reading(files[0]):
            yield from ((files[0], name) for name in list(self._file(files[0]).keys()))

    def _add(self, file: str, tensor: str, family: Family, dims: Dimensions) -> None:
        with self._reading(file):
            shape = tuple(self._file(file).get_slice(tensor).get_shape())
        for fused in family.fused_experts:
            match = match_name(fused.hf, tensor)
            if match is None:
                continue
            if len(shape) != 3 or shape[0] != dims.experts or shape[1] % len(fused.parts):
                raise ValueError(
                    f"{self.folder / file}: {tensor} has shape {shape}, not [{dims.experts}, rows, columns]"
                )
            rows = shape[1] // len(fused.parts)
            for expert in range(dims.experts):
                for part, template in enumerate(fused.parts):
                    name = template.format(layer=match.layer, expert=expert)
                    self._places[name] = _Place(file, tensor, (rows, shape[2]), expert, part * rows)
            return
        self._places[tensor] = _Place(file, tensor, shape)

    def _file(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
        return self._open[file]

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"cannot read {self.folder / file} ({error}); it is missing or damaged, copy it again"
            ) from error


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    source: str | Path,
    *,
    writer: bool = True,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write exported tensors as a Hugging Face folder: safetensors, index, config and tokenizer of `source`.

    Every rank calls it with its iterator; only the one with `writer` (rank 0) writes. About `shard_bytes` are
    held at a time. The folder appears under its name only when it is complete; one of that name is replaced.

    Raises RuntimeError naming folder and cause, after the iterator is used up: the other ranks are not left
    waiting for this one.
    """
    rest = iter(tensors)
    if not writer:
        for _ in rest:
            pass
        return
    folder, source = Path(folder), Path(source)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        dtype = _write_shards(rest, partial, shard_bytes)
        _copy_description(source, partial, dtype)
        _replace(partial, folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        for _ in rest:  # the senders of the remaining tensors
            pass
        raise RuntimeError(f"cannot write the model to {folder}: {error}") from error


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> torch.dtype:
    """Write model-0000i.safetensors and the index; returns the type of most elements."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0
    elements: dict[torch.dtype, int] = {}

    def flush() -> None:
        nonlocal pending_bytes
        shards.append(list(pending))
        save_file(pending, folder / f"{len(shards)}.partial", metadata={"format": "pt"})
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.cpu()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    flush()
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.partial").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return max(elements, key=lambda dtype: elements[dtype])


_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack)|.*\.index\.json|\..*")


def _copy_description(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy config and tokenizer files; the config's type becomes that of the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _WEIGHT_FILE.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def _replace(partial: Path, folder: Path) -> None:
    """Give a written folder its name, durably; the earlier folder of that name goes last."""
    sync_tree(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Bring every file of a folder, and the folder itself, to the disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
