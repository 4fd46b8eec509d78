"""This module knows checkpoint folders: their names, what makes one complete, the newest, pruning. It needs no
Megatron.

<root>/step-00000012/            complete: it has checkpoint.json, and every file has its recorded size;
                                 whole: every file also has its recorded checksum
<root>/.step-00000013.partial/   being written, or left by a run that died; it is never read
"""

import json
import logging
import math
import re
import shutil
import stat
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fiberpo_megatron import durable
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.printable import printable

DESCRIPTION = "checkpoint.json"
FORMAT = 2
_STEP = re.compile(r"step-(\d+)")
_PACKAGES = ("fiberpo-megatron", "megatron-core", "torch", "numpy")
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is missing, incomplete or not as it was written; an earlier one may be whole."""


class FileMark(NamedTuple):
    """Records what a file was when it was written."""

    size: int
    """Bytes."""
    crc32: int


def mark(path: Path) -> FileMark:
    """Return the size and the checksum of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return FileMark(size, crc)


@dataclass(frozen=True)
class Description:
    """Holds what a complete checkpoint says about itself (checkpoint.json, written last)."""

    step: int | None
    """The step in the folder's name; None for a folder with another kind of name."""
    layout: Mapping[str, int]
    """Ranks along every dimension of the run that wrote it."""
    model: Mapping[str, object]
    """The architecture's fields that decide names and shapes of its tensors."""
    packages: Mapping[str, str]
    state: Mapping[str, object]
    """The caller's state."""
    files: Mapping[str, FileMark]
    """Every other file, by path relative to the folder."""
    format: int = FORMAT

    def text(self) -> str:
        """Return the content of checkpoint.json."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def of_text(cls, text: str) -> "Description":
        """Return what `text` gave. Raises ValueError, TypeError or KeyError for what no save writes."""
        return _description(json.loads(text))

    def write(self, folder: Path) -> None:
        """Write and sync checkpoint.json."""
        with durable.replaced(folder / DESCRIPTION, text=True) as file:
            file.write(self.text())


def step_folder(root: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return Path(root) / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step in a folder's name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else None


def partial_folder(folder: Path) -> Path:
    """Return where a checkpoint is written before it gets its name (same parent, hence same file system)."""
    return folder.with_name(f".{folder.name}.partial")


def packages() -> dict[str, str]:
    """Return the installed versions of the packages that decide a checkpoint's format."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree that was not installed
            continue
    return found


def mark_all(folder: Path, known: Mapping[str, FileMark] | None = None) -> dict[str, FileMark]:
    """Return the marks of every file below `folder` except checkpoint.json; those that are `known` are not read
    again."""
    known = known or {}
    return {name: known[name] if name in known else mark(path) for name, path in _files(folder).items()}


def _files(folder: Path) -> dict[str, Path]:
    """Return the files below a checkpoint's folder by relative path, without checkpoint.json.

    Raises DamagedCheckpoint for anything that a save does not make, such as a symbolic link: it could lead to a file
    outside the folder, and reading a named pipe would not end.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise DamagedCheckpoint(
                f"{path} is a symbolic link or another special file, which no save makes; use another checkpoint, or "
                "copy this one with its links resolved (cp -rL)"
            )
        if stat.S_ISREG(mode) and path.name != DESCRIPTION:
            files[str(path.relative_to(folder))] = path
    return files


def describe(folder: str | Path) -> Description:
    """Read checkpoint.json and check that the folder is complete. Raises DamagedCheckpoint when it is not."""
    folder = Path(folder)
    if not folder.is_dir():
        beside = latest(folder.parent) if folder.parent.is_dir() else None
        hint = f"the newest complete one beside it is {beside}" if beside else f"{folder.parent} holds no complete one"
        raise DamagedCheckpoint(f"no checkpoint at {folder}; {hint}")
    present = _files(folder)
    try:
        description = _description(read_object(folder / DESCRIPTION, finite=False))  # a metric may be NaN
    except FileNotFoundError as error:
        raise DamagedCheckpoint(
            f"{folder} is not a complete checkpoint: it has no {DESCRIPTION}; use an earlier one"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{folder / DESCRIPTION} is damaged ({error}); use an earlier checkpoint") from error
    if description.format != FORMAT:
        found_format = printable(str(description.format))[:40]
        raise DamagedCheckpoint(f"{folder} has checkpoint format {found_format}; this version reads {FORMAT}")
    found = {name: path.stat().st_size for name, path in present.items()}
    for name, written in description.files.items():
        if found.get(name) != written.size:
            seen = "is missing" if name not in found else f"has {found[name]} bytes"
            raise DamagedCheckpoint(
                f"{folder} is damaged: {printable(name)} {seen}, {written.size} bytes were written; take an earlier "
                "checkpoint"
            )
    return description


def _description(read: dict[str, Any]) -> Description:
    """Return the content of a checkpoint.json. Raises ValueError, TypeError or KeyError for what no save writes."""
    if read.get("format") != FORMAT:
        return Description(None, {}, {}, {}, {}, {}, format=read.get("format", 0))
    for name in ("layout", "model", "packages", "state", "files"):
        if not isinstance(read[name], dict):
            raise ValueError(f"{name} is no object")
    marks = {name: FileMark(*values) for name, values in read.pop("files").items()}
    for value in (number for mark in marks.values() for number in mark):
        if type(value) is not int or value < 0:
            raise ValueError("files has a size or a checksum that is not a whole number")
    return Description(**read, files=marks)


def damaged_files(folder: Path, description: Description, *, part: int = 0, parts: int = 1) -> str | None:
    """Return a sentence on a file of a complete checkpoint that is not as it was written, or None.

    Only every `parts`-th file from number `part` on is read, largest first, so that ranks share the work.
    """
    by_size = sorted(description.files, key=lambda name: (-description.files[name].size, name))
    for name in by_size[part::parts]:
        if mark(folder / name) != description.files[name]:
            return (
                f"{folder} is damaged: {printable(name)} has another checksum than when it was written; take an "
                "earlier one"
            )
    return None


def complete_steps(root: str | Path) -> list[Path]:
    """Return the complete checkpoints below `root`, oldest first; incomplete ones are skipped with a warning."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = []
    for folder in root.iterdir():
        step = step_of(folder)
        if step is None or not folder.is_dir():
            continue
        try:
            describe(folder)
        except CheckpointError as error:
            _log.warning("skipped: %s", error)
        else:
            found.append((step, folder))
    return [folder for _, folder in sorted(found)]


def latest(root: str | Path) -> Path | None:
    """Return the newest complete checkpoint below `root`, or None.

    With several ranks, ask on one and share the answer: a shared file system may show them different folders.
    """
    found = complete_steps(root)
    return found[-1] if found else None


def best(root: str | Path, metric: str, mode: Literal["max", "min"]) -> Path | None:
    """Return the complete checkpoint with the best value of `metric` in its state's "metrics", or None if none has one.

    Of several equal values the newest wins.
    """
    measured = []
    for order, folder in enumerate(complete_steps(root)):
        metrics = describe(folder).state.get("metrics")
        value = metrics.get(metric) if isinstance(metrics, dict) else None
        if isinstance(value, int | float) and not math.isnan(value):
            measured.append((value if mode == "max" else -value, order, folder))
    return max(measured)[2] if measured else None


def prune(root: str | Path, keep: int, spare: Collection[Path] = ()) -> list[Path]:
    """Delete all but the `keep` newest complete checkpoints and those to `spare`, and the remains of unfinished ones.

    Return the deleted ones. One rank calls this, while no checkpoint is being written. The newest complete one is never
    deleted.
    """
    root = Path(root)
    doomed = [folder for folder in complete_steps(root)[: -max(keep, 1)] if folder not in spare]
    for folder in doomed:
        hidden = partial_folder(folder)  # renamed first, so that a kill during the deletion leaves no half checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
        durable.rename(folder, hidden)  # synced, or a lost machine could bring the name back without the files
    if root.is_dir():
        for remains in (*root.glob(".step-*.partial"), *root.glob(".step-*.old")):
            durable.remove_tree(remains)
    return doomed
