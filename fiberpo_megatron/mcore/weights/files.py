"""Reads safetensors folders in Hugging Face's form: which tensors they hold, and parts of these tensors."""

import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.mcore.families import Architecture, WeightTable
from fiberpo_megatron.mcore.families.transforms import Shape
from fiberpo_megatron.mcore.families.weight_tables import match_name
from fiberpo_megatron.printable import printable

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class _Place:
    """Says where a tensor lies: it is a tensor of a file, or one expert's rows of a stacked tensor."""

    file: str
    tensor: str
    shape: Shape
    kind: str
    """The type under safetensors' name for it, such as BF16."""
    expert: int | None = None
    first_row: int = 0


class HfFiles:
    """Gives access to the tensors of a folder; files are mapped into memory, and only requested parts are read.

    Raises FileNotFoundError when the folder holds no weights, ValueError for a file that cannot be read.
    """

    def __init__(self, folder: Path, table: WeightTable, architecture: Architecture) -> None:
        self.folder = folder
        self._open = _opened(folder)
        self._places: dict[str, _Place] = {}
        for file, opened in self._open.items():
            for tensor in _names(opened):
                self._add(file, tensor, table, architecture)

    @property
    def names(self) -> Iterable[str]:
        """Return all names of tensors; those of experts name a single expert, even if the files stack them."""
        return self._places.keys()

    def place(self, name: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self._places[name].file

    def check(self, name: str, shape: Shape) -> None:
        """Raise ValueError when a tensor has another shape, or not the type of a weight."""
        place = self._places[name]
        if place.shape != shape:
            raise ValueError(
                f"{self.folder / place.file}: {name} has shape {_shown(place.shape)}, the model of config.json "
                f"needs {shape}; correct config.json, or take the files that belong to it"
            )
        if place.kind not in _WEIGHT_KINDS:
            raise ValueError(
                f"{self.folder / place.file}: {name} is stored as {place.kind}, a quantised weight without its scale; "
                f"convert the model to bfloat16 first (supported: {', '.join(_WEIGHT_KINDS)})"
            )

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the elements [start, stop) of `name` along `dim`; the whole tensor when `stop` is None."""
        place = self._places[name]
        stop = place.shape[dim] if stop is None else stop
        window = [slice(0, size) for size in place.shape]
        window[dim] = slice(start, stop)
        rows = window[0]
        window[0] = slice(rows.start + place.first_row, rows.stop + place.first_row)
        with _reading(self.folder / place.file):
            stored = self._open[place.file].get_slice(place.tensor)
            if start == stop:  # a vocabulary shard that is all padding
                kept = place.shape[:dim] + (0,) + place.shape[dim + 1 :]
                return stored[0:1].new_empty(kept)
            return stored[tuple(window)] if place.expert is None else stored[(place.expert, *window)]

    def _add(self, file: str, tensor: str, table: WeightTable, architecture: Architecture) -> None:
        with _reading(self.folder / file):
            stored = self._open[file].get_slice(tensor)
            shape, kind = tuple(stored.get_shape()), stored.get_dtype()
        experts = architecture.experts.count if architecture.experts else 0
        for fused in table.fused_experts:
            match = match_name(fused.hf, tensor)
            if match is None:
                continue
            if len(shape) != 3 or shape[0] != experts or shape[1] % len(fused.parts):
                raise ValueError(
                    f"{self.folder / file}: {printable(tensor)} has shape {_shown(shape)}, "
                    f"not [{experts}, rows, columns]"
                )
            rows = shape[1] // len(fused.parts)
            for expert in range(experts):
                for part, template in enumerate(fused.parts):
                    name = template.format(layer=match.layer, expert=expert)
                    self._places[name] = _Place(file, tensor, (rows, shape[2]), kind, expert, part * rows)
            return
        self._places[tensor] = _Place(file, tensor, shape, kind)


@dataclass(frozen=True)
class Stored:
    """Says in which file and as which type a folder holds a tensor."""

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


_WEIGHT_KINDS = ("F64", "F32", "BF16", "F16")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the file and the type of every tensor of a folder by name; nothing for a folder without weights."""
    if not any(folder.glob("*.safetensors")):
        return {}
    found = {}
    for file, opened in _opened(folder).items():
        for name in _names(opened):
            kind = opened.get_slice(name).get_dtype()
            if kind in TYPES:  # tensors of other types are never loaded, and so never written
                found[name] = Stored(file, TYPES[kind])
    return found


def tensor_shapes(folder: Path) -> dict[str, Shape]:
    """Return the shape of every tensor of a folder by name, read from the headers; nothing without weights.

    Raises ValueError or FileNotFoundError as `HfFiles` does.
    """
    if not any(folder.glob("*.safetensors")):
        return {}
    return {
        name: tuple(opened.get_slice(name).get_shape())
        for opened in _opened(folder).values()
        for name in _names(opened)
    }


def _opened(folder: Path) -> dict[str, Any]:
    """Return the opened files of a folder by name: those of its index, or the single file where it has no index.

    Only their headers are read. Raises FileNotFoundError or ValueError where it is not clear which tensors are the
    model's, because transformers, SGLang and this loader would then each take others.
    """
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index.is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(names) != 1:
            listed = ", ".join(names[:4]) or "no other kind is read"
            raise FileNotFoundError(
                f"{folder} holds {len(names)} .safetensors files ({listed}) and no {INDEX_NAME}; expected "
                f"{SINGLE_NAME} alone, or several files with their index: download what is missing, or move away "
                "what is not the model's"
            )
        return {names[0]: _open(folder / names[0])}
    placed = _placed(index)
    files = {file: _open(folder / file) for file in sorted({file for file, _ in placed})}
    if single.is_file() and SINGLE_NAME not in files:
        raise ValueError(f"{folder} holds {SINGLE_NAME} and {INDEX_NAME}, which are two models; remove one of them")
    held = {(file, name) for file, opened in files.items() for name in _names(opened)}
    for file, name in sorted(placed ^ held):
        what = "does not hold" if (file, name) in placed else "holds"
        where = "places it there" if (file, name) in placed else "does not place it there"
        raise ValueError(
            f"{folder / file} {what} {printable(name)}, but {INDEX_NAME} {where}; download the model again"
        )
    return files


def _placed(index: Path) -> set[tuple[str, str]]:
    """Return (file, tensor) for every entry of an index.

    Raises ValueError for a file outside the model's folder, or in a folder below it: what a downloaded index names is
    read, and files of the same names are written when the trained model is saved.
    """
    try:
        placed = {(str(file), str(name)) for name, file in read_object(index)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{index} is not a safetensors index ({text}); download the model again") from error
    for file, name in sorted(placed):
        if not _PLAIN.fullmatch(file):
            raise ValueError(
                f"{index} places {printable(name)} in {printable(file)!r}, which is not the plain name of a "
                ".safetensors file in the same folder; download the model again, or put all its files into one folder "
                "and correct the index"
            )
    return placed


_PLAIN = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,200}\.safetensors")
"""Names of weight files. None of them is hidden, leads to another folder or breaks a line."""


def _names(opened: Any) -> list[str]:
    names: list[str] = opened.keys()
    return names


def _shown(shape: Shape) -> str:
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} dimensions"


def _open(file: Path) -> Any:
    with _reading(file):
        if not stat.S_ISREG(file.stat().st_mode):  # opening a named pipe would wait for ever
            raise OSError("it is not a regular file")
        return safe_open(file, framework="pt", device="cpu")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot read {file} ({printable(str(error))}); it is missing, damaged or a Git LFS pointer: "
            "download it again"
        ) from error
