"""This module reads the contents of a checkpoint; nothing in its files can execute code.

Megatron and torch would unpickle `.metadata`, and load everything that is not a tensor with `weights_only=False`. Here
`metadata.py` reads the former, and torch's weights-only loader, which builds tensors and plain data alone, the rest.
The classes below are those that Megatron and torch let a caller replace: the strategies of `dist_checkpointing.load`, a
storage reader, and a load planner.
"""

import io
import os
import re
import textwrap
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from fiberpo_megatron.mcore.checkpoint.folders import CheckpointError, FileMark
from fiberpo_megatron.mcore.checkpoint.metadata import METADATA, read_metadata
from fiberpo_megatron.printable import printable

_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np.empty(0).__reduce__()[0],  # the function of numpy that makes an empty array
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),  # its name before numpy 2
]
"""What the state of numpy's random generator, an array, needs beside what the weights-only loader allows anyway."""


@dataclass(frozen=True)
class Contents:
    """Holds what is read of a checkpoint before its tensors are."""

    metadata: Metadata
    """Which tensors there are, and where they lie."""
    common: dict[str, Any]
    """What all ranks share: the options of the optimizer and the step of the schedule."""


def read_contents(folder: Path, files: Mapping[str, FileMark]) -> Contents:
    """Read a checkpoint's description and common state. `files` are the files of which it consists.

    Raises CheckpointError for files that are missing or that this package and Megatron did not write.
    """
    for name in (METADATA, COMMON_STATE_FNAME, CONFIG_FNAME):
        if name not in files:
            raise CheckpointError(
                f"{folder} is not a whole checkpoint: {name} is missing in it; use another checkpoint"
            )
    if files[CONFIG_FNAME].size > 2**16:
        raise CheckpointError(f"{folder / CONFIG_FNAME} has {files[CONFIG_FNAME].size} bytes; use another checkpoint")
    with open(folder / COMMON_STATE_FNAME, "rb") as file:
        common = load_plain(file, files[COMMON_STATE_FNAME].size, str(folder / COMMON_STATE_FNAME))
    if not isinstance(common, dict):
        raise CheckpointError(f"{folder / COMMON_STATE_FNAME} holds no state; use another checkpoint")
    return Contents(read_metadata(folder, files), common)


def load_plain(file: IO[bytes], size: int, name: str) -> Any:
    """Return what `torch.save` wrote, if it consists of tensors and plain data. `size` is the number of bytes.

    Raises CheckpointError that names `name` for everything else: objects that only code could rebuild, archives that
    are compressed or declare more than they hold, other formats.
    """
    check_archive(file, size, name)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises many types
        found = re.search(r"GLOBAL (\S+)", str(error))
        text = textwrap.shorten(str(error).rpartition("WeightsUnpickler error: ")[2], 200)
        cause = f"it names {found[1]}, which only code could rebuild" if found else f"{type(error).__name__}: {text}"
        raise CheckpointError(
            f"{name} is not data that a checkpoint holds: {printable(cause)}; use another checkpoint"
        ) from error


def check_archive(file: IO[bytes], size: int, name: str) -> None:
    """Raise CheckpointError for a file that is not what `torch.save` writes: a ZIP archive that is not compressed.

    Its members then take no more memory than `size`, whatever they declare. Leaves the position at the start.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:  # the standard library raises many types for a damaged archive
        raise CheckpointError(
            f"{name} is not in torch's format ({printable(str(error))}); use another checkpoint"
        ) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{name} is compressed, which torch does not do; use another checkpoint")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{name} declares more bytes than it has ({size}); use another checkpoint")
    file.seek(0)


class _Reader(torch_checkpoint.FileSystemReader):
    """Gives torch the description that was read before, and loads each part of a file with `load_plain`."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: torch_checkpoint.LoadPlan, planner: torch_checkpoint.LoadPlanner) -> Future[None]:
        for index, items in _by_place(plan.items).items():
            place = self.storage_data[index]
            with open(self.path / place.relative_path, "rb") as file:
                part = io.BufferedReader(_Part(file, place.offset, place.length))
                if items[0].type == LoadItemType.BYTE_IO:
                    planner.load_bytes(items[0], io.BytesIO(part.read()))
                else:
                    _fill(items, part, place.length, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _by_place(items: Sequence[ReadItem]) -> dict[MetadataIndex, list[ReadItem]]:
    """Return what is read of each stored part, so that it is loaded once: a shard takes several boxes of it."""
    found: dict[MetadataIndex, list[ReadItem]] = {}
    for item in items:
        found.setdefault(item.storage_index, []).append(item)
    return found


def _fill(items: Sequence[ReadItem], part: IO[bytes], size: int, planner: torch_checkpoint.LoadPlanner) -> None:
    """Copy what is wanted of a stored tensor into the model's or the optimizer's tensors."""
    name = f"the checkpoint's tensor {printable(items[0].dest_index.fqn)}"
    stored = load_plain(part, size, name)
    if not isinstance(stored, Tensor) or stored.layout != torch.strided:
        raise CheckpointError(f"{name} is no plain tensor; use another checkpoint")
    for item in items:
        wanted = planner.resolve_tensor(item).detach()
        found = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        if wanted.shape != found.shape:
            raise CheckpointError(f"{name} has a part of shape {tuple(found.shape)}, {tuple(wanted.shape)} is needed")
        wanted.copy_(found)
        planner.commit_tensor(item, wanted)


class _Part(io.RawIOBase):
    """Shows `length` bytes of a file from `begin` on as a file of their own; torch's view cannot seek from the end."""

    def __init__(self, file: io.BufferedReader, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"position {start + offset} lies before the start")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        left = max(self._length - self._at, 0)
        self._file.seek(self._begin + self._at)
        count: int = self._file.readinto(memoryview(buffer)[:left])
        self._at += count
        return count


class _Planner(MCoreLoadPlanner):
    """Loads what is not a tensor with the weights-only loader."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        objects = load_plain(value, value.getbuffer().nbytes, f"the checkpoint's item {printable(name)}")
        if "_extra_state" in name and isinstance(objects, list):
            objects = [_without_pickle(part) for part in objects]
        set_element(self.original_state_dict, self.mappings[name], objects)


def _without_pickle(state: Any) -> Any:
    """Return an empty state in place of Transformer Engine's FP8 state, which is a pickle inside a tensor.

    Transformer Engine would unpickle it. What it holds, the recipe, the run's config gives as well.
    """
    return torch.empty(0, dtype=torch.uint8) if isinstance(state, Tensor) and state.numel() else state


class TensorStrategy(TorchDistLoadShardedStrategy):
    """Reads tensors and objects as Megatron's own strategy does, through the reader and the planner above."""

    def __init__(self, contents: Contents) -> None:
        super().__init__()
        self._metadata = contents.metadata

    def load(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path, async_strategy: str = ""
    ) -> dict[str, Any]:
        wanted = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[part for part in wanted if not part.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={part.key: part for part in wanted if part.allow_shape_mismatch},
        )
        reader = _Reader(Path(checkpoint_dir), self._metadata)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            # every rank knows what it reads: with `no_dist` its plan need not travel through rank 0 and back
            torch_checkpoint.load(state, storage_reader=reader, planner=planner, no_dist=True)
        unwrapped = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(unwrapped, flat, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: str | Path, metadata: Metadata | None = None) -> dict[str, Any]:
        found: dict[str, Any] = super().load_tensors_metadata(checkpoint_dir, metadata or self._metadata)
        return found

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        objects = [
            ShardedObject.empty_from_unique_key(name)
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, BytesStorageMetadata)
        ]
        return {part.unique_key: part for part in objects} | self.load_tensors_metadata(checkpoint_dir)
