"""This module writes files that appear under their names only when they are whole, and that outlive a lost machine.

A rename is durable only after the folder has been synced as well, hence the second sync of every function here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replaced(path: Path, *, text: bool = False, mode: int | None = None) -> Iterator[IO[Any]]:
    """Give a new file to write to; it gets the name `path` when the block ends, whole and synced.

    An older file of that name stays as it is until then, and for good if the block raises (a full disk, for example).
    `text` means UTF-8. `mode` is the permission of the new file; the umask decides without it. Only one process may
    write a path at a time. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w" if text else "wb", encoding="utf-8" if text else None) as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def rename(old: Path, new: Path) -> None:
    """Rename a file or a folder in the same parent folder, replacing a file of that name, and sync the parent."""
    os.replace(old, new)
    sync(new.parent)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Write every file of a folder, and the names in it, to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
