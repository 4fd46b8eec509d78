"""Safetensors folders in Hugging Face's form: which tensors they hold, and reading parts of them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fiberpo_megatron.mcore.weight_tables import Family, match_name
from fiberpo_megatron.mcore.weights_transforms import Dimensions, Shape

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


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
        for file, tensor in _listed(folder):
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
        with _reading(self.folder / place.file):
            stored = self._file(place.file).get_slice(place.tensor)
            if start == stop:  # a vocabulary shard that is all padding
                kept = place.shape[:dim] + (0,) + place.shape[dim + 1 :]
                return stored[0:1].new_empty(kept)
            return stored[tuple(window)] if place.expert is None else stored[(place.expert, *window)]

    def _add(self, file: str, tensor: str, family: Family, dims: Dimensions) -> None:
        with _reading(self.folder / file):
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


@dataclass(frozen=True)
class Stored:
    """How a folder holds a tensor."""

    file: str
    dtype: torch.dtype


TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """File and type of every tensor of a folder by name; empty for a folder without weights."""
    if not any(folder.glob("*.safetensors")):
        return {}
    by_file: dict[str, list[str]] = {}
    for file, name in _listed(folder):
        by_file.setdefault(file, []).append(name)
    found = {}
    for file, names in by_file.items():
        with _reading(folder / file), safe_open(folder / file, framework="pt", device="cpu") as opened:
            for name in names:
                found[name] = Stored(file, TYPES[opened.get_slice(name).get_dtype()])
    return found


def _listed(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, tensor) pairs from the index, else from the single file."""
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not a safetensors index ({error!r}); download the model again") from error
        yield from ((file, name) for name, file in weight_map.items())
        return
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder} holds {len(files)} .safetensors files and no {INDEX_NAME}; expected "
            f"{SINGLE_NAME}, or several files with their index"
        )
    with _reading(folder / files[0]), safe_open(folder / files[0], framework="pt", device="cpu") as opened:
        names = list(opened.keys())
    yield from ((files[0], name) for name in names)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {file} ({error}); it is missing or damaged, copy it again") from error
