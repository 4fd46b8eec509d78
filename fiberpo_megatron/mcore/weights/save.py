"""Writes exported tensors as a Hugging Face folder; each tensor goes to the disk as it arrives."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fiberpo_megatron import durable
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.mcore.weights.files import INDEX_NAME, SINGLE_NAME, TYPES, Stored, stored_tensors

DEFAULT_SHARD_BYTES = 4 * 2**30
_TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
_HEADER_BYTES = 2**20
"""Room that a file's header has, enough for about 6000 tensors. The header is written last and padded with spaces,
which the format allows."""


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    source: str | Path,
    *,
    writer: bool = True,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write exported tensors as a Hugging Face folder with the config and the tokenizer of `source`.

    A tensor that `source` holds is written in the type and into the file that it has there. Other tensors keep their
    type and go to files of about `shard_bytes`. One tensor is in memory at a time.

    Every rank must call this with its iterator; only the rank with `writer` (rank 0) writes. The folder appears under
    its name only when it is complete, and then replaces an older folder of that name.

    Raises RuntimeError that names the folder and the cause. The iterator is used up before that, so that the other
    ranks do not wait for this one.
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
        dtype = _write(rest, partial, stored_tensors(source), shard_bytes)
        _copy_description(source, partial, dtype)
        _replace(partial, folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        for _ in rest:  # other ranks still send the remaining tensors
            pass
        raise RuntimeError(f"cannot write the model to {folder}: {error}") from error


class _File:
    """This is a safetensors file that grows by a tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self.size = 0
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = 64
        self._file: IO[bytes] = path.open("wb")
        self._file.seek(8 + _HEADER_BYTES)

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Return whether the tensor would be aligned to its type and its entry would fit into the header."""
        return self.size % tensor.itemsize == 0 and self._header_bytes + len(name) + 200 < _HEADER_BYTES

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.cpu().contiguous()
        end = self.size + tensor.nbytes
        entry = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.size, end]}
        self._entries[name] = entry
        self._header_bytes += len(json.dumps({name: entry}))
        tensor.view(-1).view(torch.uint8).numpy().tofile(self._file)
        self.names.append(name)
        self.size = end

    def close(self) -> None:
        header = json.dumps(self._entries).encode().ljust(_HEADER_BYTES)
        assert len(header) == _HEADER_BYTES
        self._file.seek(0)
        self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header)
        self._file.close()


def _write(
    tensors: Iterator[tuple[str, Tensor]], folder: Path, stored: Mapping[str, Stored], shard_bytes: int
) -> torch.dtype:
    """Write the files and, for several, the index; return the type that most elements have."""
    named: dict[str, _File] = {}
    further: list[_File] = []
    elements: dict[torch.dtype, int] = {}
    try:
        for name, tensor in tensors:
            place = stored.get(name)
            if place is not None:
                tensor = tensor.to(place.dtype)
                if place.file not in named:
                    named[place.file] = _File(folder / place.file)
            file = named[place.file] if place is not None else None
            if file is None or not file.takes(name, tensor):
                full = not further or further[-1].size + tensor.nbytes > shard_bytes and further[-1].size > 0
                if full or not further[-1].takes(name, tensor):
                    further.append(_File(folder / f"{len(further)}.partial"))
                file = further[-1]
            file.add(name, tensor)
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    finally:
        for file in (*named.values(), *further):
            file.close()
    _name_files(folder, named, further)
    return max(elements, key=lambda dtype: elements[dtype])


def _name_files(folder: Path, named: Mapping[str, _File], further: list[_File]) -> None:
    """Give the further files their names and write the index where there are several files."""
    files = dict(named)
    for i, file in enumerate(further):
        name = f"model-{i + 1:05d}-of-{len(further):05d}.safetensors"
        if not named and len(further) == 1:
            name = SINGLE_NAME
        while name in files or (named and not name.startswith("more-")):
            name = f"more-{name}"
        (folder / f"{i}.partial").rename(folder / name)
        files[name] = file
    if files.keys() != {SINGLE_NAME}:
        index = {
            "metadata": {"total_size": sum(file.size for file in files.values())},
            "weight_map": {tensor: name for name, file in files.items() for tensor in file.names},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack)|.*\.index\.json|\..*")


def _copy_description(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy the config and tokenizer files; the type in the config becomes that of the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _WEIGHT_FILE.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    config_path = folder / "config.json"
    config = read_object(config_path)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = 0  # these layers were not loaded and are not written
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def _replace(partial: Path, folder: Path) -> None:
    """Give a completely written folder its name; an older folder of that name is deleted afterwards."""
    durable.sync_tree(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        durable.rename(folder, old)
    durable.rename(partial, folder)
    durable.remove_tree(old)
