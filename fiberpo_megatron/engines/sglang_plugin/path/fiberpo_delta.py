"""This module of the SGLang plugin loads publications that hold only what changed (`weight_sync/delta.py`).

The server keeps a copy of the weights as safetensors files in its temporary folder. It brings the copy up to date with
what was published, compares the checksum of every tensor with the trainer's, and only then loads the copy. It needs the
standard library and numpy alone.
"""

import asyncio
import hashlib
import json
import mmap
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "delta.json"
STATE = "fiberpo-state.json"
AT, TO = "#at", "#to"
"""Ends of the names under which a file has the positions of changed elements, and their new values."""
BASE_IS_MISSING = "this server does not hold the weights on which the publication builds"
LARGEST_HEADER = 100 * 2**20
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


class BadPublication(ValueError):
    """This is raised for a publication that cannot be applied, or does not give the weights that the trainer has."""


def take(folder: Path, mirror: Path) -> Path:
    """Bring `mirror` up to date with the publication in `folder`, and return it.

    While files change the mirror has no state; a server that is killed meanwhile refuses the next difference, and the
    trainer then publishes all weights.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    state = _state(mirror)
    if manifest["base"] is not None and (state is None or _whole(state["checksums"]) != manifest["base_checksum"]):
        raise BadPublication(f"{BASE_IS_MISSING} ({manifest['base']})")
    if manifest["base"] is None:
        shutil.rmtree(mirror, ignore_errors=True)
        mirror.mkdir(parents=True)
    else:
        (mirror / STATE).unlink()
    known = {} if state is None or manifest["base"] is None else dict(state["checksums"])
    for name in manifest["files"]:
        if Path(name).name != name:
            raise BadPublication(f"{name!r} is no name of a file")
        if manifest["base"] is None or not name.endswith(".safetensors"):
            shutil.copyfile(folder / name, mirror / name)
            changed = None
        else:
            changed = _apply(folder / name, mirror / name)
        if name.endswith(".safetensors"):
            known.update(_checksums(mirror / name, changed))
    wrong = [name for name, checksum in manifest["checksums"].items() if known.get(name) != checksum]
    if wrong or known.keys() != manifest["checksums"].keys():
        raise BadPublication(
            f"{len(wrong)} tensors are not those of the trainer, the first is {(wrong or ['none'])[0]}"
        )
    partial = mirror / (STATE + ".partial")
    partial.write_text(json.dumps({"version": manifest["version"], "checksums": known}))
    partial.replace(mirror / STATE)
    return mirror


def _whole(checksums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(checksums.items())).encode()).hexdigest()


def _state(mirror: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((mirror / STATE).read_text())
    except FileNotFoundError:
        return None
    return dict(found)


def _entries(memory: Any) -> dict[str, tuple[str, int, int]]:
    """Return type, begin and end of each tensor in the bytes of a safetensors file."""
    length = int.from_bytes(memory[:8], "little")
    if length > min(LARGEST_HEADER, len(memory) - 8):
        raise BadPublication(f"a header of {length} bytes")
    found = {}
    for name, entry in json.loads(bytes(memory[8 : 8 + length])).items():
        if name != "__metadata__":
            begin, end = (8 + length + int(at) for at in entry["data_offsets"])
            if not 8 + length <= begin <= end <= len(memory):
                raise BadPublication(f"{name} lies outside its file")
            found[name] = (str(entry["dtype"]), begin, end)
    return found


def _apply(changes: Path, target: Path) -> list[str]:
    """Write the changes into the target in place; return the names of the tensors that changed."""
    with changes.open("rb") as source, target.open("r+b") as file:
        read = memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ))
        write = memoryview(mmap.mmap(file.fileno(), 0))
        new, old = _entries(read), _entries(write)
        names = []
        for name, (kind, begin, end) in new.items():
            if name.endswith(AT):
                continue
            tensor = name.removesuffix(TO)
            if tensor not in old or old[tensor][0] != kind:
                raise BadPublication(f"{tensor} of type {kind} is not in the copy of the weights")
            names.append(tensor)
            _, first, last = old[tensor]
            item = np.dtype(f"u{ITEM_BYTES.get(kind, 1)}")
            values = np.frombuffer(read[begin:end], item)
            whole = np.frombuffer(write[first:last], item)
            if name != tensor:
                at = np.frombuffer(read[slice(*new[tensor + AT][1:])], np.uint32)
                if len(at) != len(values) or (len(at) and at.max() >= len(whole)):
                    raise BadPublication(f"{tensor}: positions of changes lie outside of it")
                whole[at] = values
            elif len(values) == len(whole):
                whole[:] = values
            else:
                raise BadPublication(f"{tensor} has {len(values)} elements, but {len(whole)} in the copy")
        return names


def _checksums(file: Path, names: list[str] | None) -> dict[str, str]:
    """Return the checksums of tensors of a file, by default of all."""
    with file.open("rb") as opened:
        memory = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        entries = _entries(memory)
        return {
            name: hashlib.sha256(memory[slice(*entries[name][1:])]).hexdigest()
            for name in (entries if names is None else names)
        }


async def update_from_disk(original: Callable[..., Any], manager: Any, request: Any, *rest: Any) -> Any:
    """Load a publication of differences through the server's copy; any other folder is SGLang's own."""
    folder = Path(request.model_path)
    if (folder / MANIFEST).is_file():
        mirror = Path(tempfile.gettempdir()) / "fiberpo-weights"
        try:
            request.model_path = str(await asyncio.to_thread(take, folder, mirror))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return False, f"{type(error).__name__}: {error}", 0
    return await original(manager, request, *rest)


def register() -> None:
    """Register the hook of this module."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_weights_from_disk",
        update_from_disk,
        HookType.AROUND,
    )
