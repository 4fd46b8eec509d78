"""This module reads torch's description of a distributed checkpoint (`.metadata`) without executing anything.

The file is a pickle. An ordinary unpickler calls whatever the file names, so that whoever wrote the file decides what
runs. The reader here knows the opcodes and the names that torch writes into this file, and refuses all others. It makes
no object of a class that the file names: it keeps the class's name and the object's state as plain data, from which
`read_metadata` builds torch's objects, once every number and every place in them has been found possible.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fiberpo_megatron.mcore.checkpoint.folders import CheckpointError, FileMark
from fiberpo_megatron.printable import printable

METADATA = ".metadata"
LIMIT_BYTES = 256 * 2**20
"""A larger file is refused. It has about 150 bytes for each part of a tensor; the objects in memory take 20 times
that."""


class _Record:
    """Stands for an object of a class that the file names."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None

    def field(self, name: str, default: Any = None) -> Any:
        """Return a field of the object's state."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Named:
    """Stands for a class or a function that the file names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_RECORDS = {
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
}
_CALLED: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch.Size": lambda arguments: _size(*arguments),
    "torch.serialization._get_layout": lambda arguments: None,  # the layout and the memory format of a tensor are
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": lambda arguments: None,  # not used by torch either
    "pathlib.PosixPath": lambda arguments: None,  # the folder in which the checkpoint was written
    "pathlib._local.PosixPath": lambda arguments: None,
}


def _size(values: Any) -> torch.Size:
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise ValueError("the shape of a tensor is not a list of at most 64 numbers")
    return torch.Size(_count(value) for value in values)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size or a place in a file is not a whole number from 0 to 2^63 - 1")
    return value


class _Reader(pickle._Unpickler):
    """Reads a pickle into plain data, `_Record`s and shapes.

    It derives from the unpickler that the standard library has in Python, because one can leave opcodes out there. The
    one in C has all of them, among them those that make it set a table of any size aside.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _RECORDS or full in _CALLED:
            return _Named(full)
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        raise pickle.UnpicklingError(
            f"it names {printable(full)[:200]}, which no checkpoint of torch needs: the file was made to run code"
        )

    def _object(self) -> None:
        """NEWOBJ: an object of a class without arguments."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, _Named) or kind.name not in _RECORDS or arguments != ():
            raise pickle.UnpicklingError("it makes an object of something else than a class of torch's metadata")
        self.stack.append(_Record(kind.name.rpartition(".")[2]))

    def _state(self) -> None:
        """BUILD: the state of such an object."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Record):
            raise pickle.UnpicklingError("it gives a state to something else than an object of torch's metadata")
        self.stack[-1].state = state

    def _call(self) -> None:
        """REDUCE: one of a few functions; none of them is called, their results are made here."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Named) or function.name not in _CALLED or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something else than the functions of torch's metadata")
        self.stack.append(_CALLED[function.name](arguments))

    def _items(self) -> None:
        """SETITEMS: entries of a dictionary. A tuple as a key could be nested so deep that its hash never ends."""
        items = self.pop_mark()  # type: ignore[attr-defined]  # typeshed leaves it out
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str | _Record) for key in items[::2]):
            raise pickle.UnpicklingError("it has a dictionary with keys that are neither names nor places")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _item(self) -> None:
        """SETITEM: one entry of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        if not isinstance(self.stack[-1], dict) or not isinstance(key, str | _Record):
            raise pickle.UnpicklingError("it has a dictionary with keys that are neither names nor places")
        self.stack[-1][key] = value

    dispatch = {  # type: ignore[assignment]  # the class is this one
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
            *(pickle.LONG1, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.STACK_GLOBAL),
            *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
        )
    } | {
        pickle.NEWOBJ[0]: _object,
        pickle.BUILD[0]: _state,
        pickle.REDUCE[0]: _call,
        pickle.SETITEM[0]: _item,
        pickle.SETITEMS[0]: _items,
    }


def read_metadata(folder: Path, files: Mapping[str, FileMark]) -> Metadata:
    """Return torch's description of the checkpoint in `folder`.

    `files` are the files that the checkpoint has, and the only ones that the description may refer to. Raises
    CheckpointError for a file that torch did not write, whatever is in it; nothing in it is ever executed, and memory
    is taken in proportion to its size.
    """
    path = folder / METADATA
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, at most {LIMIT_BYTES} are read")
        return _metadata(_Reader(io.BytesIO(path.read_bytes())).load(), files)
    except KeyError as error:
        cause = f"it has the opcode {error}, which torch does not write"
    except (pickle.UnpicklingError, ValueError) as error:
        cause = str(error)
    except Exception as error:  # the stack of a pickle that ends early, text that is no UTF-8, and others
        cause = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"{path} is not torch's description of a checkpoint: {printable(cause)}; use another checkpoint"
    )


def _metadata(read: Any, files: Mapping[str, FileMark]) -> Metadata:
    described, places = _dict(_kind(read, "Metadata").field("state_dict_metadata")), _dict(read.field("storage_data"))
    return Metadata(
        state_dict_metadata={_text(name): _stored(value) for name, value in described.items()},
        storage_data={_index(index): _place(place, files) for index, place in places.items()},
        storage_meta=StorageMeta(),
        version=read.field("version"),
    )


def _kind(value: Any, kind: str) -> _Record:
    if not isinstance(value, _Record) or value.kind != kind:
        raise ValueError(f"a {kind} is missing")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError("a table is missing")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is not text")
    return value


def _shape(value: Any) -> torch.Size:
    if not isinstance(value, torch.Size):
        raise ValueError("a shape is missing")
    return value


def _stored(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    """Return what is stored under one name: a tensor in parts, or bytes."""
    if isinstance(value, _Record) and value.kind == "BytesStorageMetadata":
        return BytesStorageMetadata()
    record = _kind(value, "TensorStorageMetadata")
    state = _kind(record.field("properties"), "TensorProperties").state
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise ValueError("a tensor has no type")
    size, chunks = _shape(record.field("size")), record.field("chunks")
    if not isinstance(chunks, list):
        raise ValueError("a tensor has no list of its parts")
    return TensorStorageMetadata(TensorProperties(dtype=state[0]), size, [_chunk(chunk, size) for chunk in chunks])


def _chunk(value: Any, size: torch.Size) -> ChunkStorageMetadata:
    record = _kind(value, "ChunkStorageMetadata")
    offsets, sizes = _shape(record.field("offsets")), _shape(record.field("sizes"))
    if not len(offsets) == len(sizes) == len(size) or any(a + b > c for a, b, c in zip(offsets, sizes, size)):
        raise ValueError("a part of a tensor lies outside the tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _index(value: Any) -> MetadataIndex:
    record = _kind(value, "MetadataIndex")
    offset, index = record.field("offset"), record.field("index")
    return MetadataIndex(
        _text(record.field("fqn")),
        None if offset is None else _shape(offset),
        None if index is None else _count(index),
    )


def _place(value: Any, files: Mapping[str, FileMark]) -> _StorageInfo:
    record = _kind(value, "_StorageInfo")
    name, offset, length = (
        _text(record.field("relative_path")),
        _count(record.field("offset")),
        _count(record.field("length")),
    )
    if name not in files or "/" in name:
        raise ValueError(f"it refers to {name!r}, which is not a file of the checkpoint")
    if offset + length > files[name].size:
        raise ValueError(f"it refers to byte {offset + length} of {name}, which has {files[name].size} bytes")
    if record.field("transform_descriptors"):
        raise ValueError("its tensors were transformed (compressed, for example), which is not read here")
    return _StorageInfo(name, offset, length)
