"""This module writes files that appear under their names only when they are whole, and that outlive a lost machine.

A rename is durable only after the folder has been synced as well, hence the second sync of every function here.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_log = logging.getLogger(__name__)


class WriteFailed(OSError):
    """This error names a file or folder that could not be written, the cause, and what to do."""


class Disk:
    """These are the calls that reach the file system. A simulation of lost machines and full disks sets another one
    with `use`."""

    def open(self, path: Path, mode: str) -> IO[Any]:
        """Open a file to write to; text is UTF-8."""
        return path.open(mode, encoding=None if "b" in mode else "utf-8")

    def sync(self, handle: int, path: Path) -> None:
        """Have what was written to an open file, or the names in an open folder, reach the disk."""
        os.fsync(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, which a file may have had."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Delete a file, which need not be there."""
        path.unlink(missing_ok=True)

    def remove_tree(self, folder: Path) -> None:
        """Delete as much of a folder as can be deleted."""
        shutil.rmtree(folder, ignore_errors=True)

    def free(self, folder: Path) -> int:
        """Return how many bytes the file system of a folder can still take."""
        return shutil.disk_usage(folder).free


_disk = Disk()


@contextmanager
def use(disk: Disk) -> Iterator[None]:
    """Let every write of this process go to another disk inside the block."""
    global _disk
    before, _disk = _disk, disk
    try:
        yield
    finally:
        _disk = before


def opened(path: Path, mode: str) -> IO[Any]:
    """Open a file that is written to bit by bit, and is read up to where its last record is whole."""
    return _disk.open(path, mode)


def sync_handle(handle: int, path: Path) -> None:
    """Have what was written to an open file reach the disk. Raises WriteFailed about `path`."""
    with explained(path):
        _disk.sync(handle, path)


def remove(path: Path) -> None:
    """Delete a file, which need not be there."""
    with explained(path):
        _disk.remove(path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise an OSError of the block again as WriteFailed about `path`.

    The kernel's own errors of a write or a sync name no file, and none says what to do. An error without a number is
    raised as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, WriteFailed):  # it says something of its own
            raise
        name = error.filename2 or error.filename  # of a copy or a rename: its target
        text = f"{error.strerror or error}; {_fix(error.errno, path)}"
        raise WriteFailed(error.errno, text, name if isinstance(name, str) else str(path)) from error


def _fix(number: int | None, path: Path) -> str:
    again = "then start again, a run with --resume"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{_free(path)}. Make room, or have the quota raised, {again}"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"make it writable for user {os.geteuid()}, {again}"
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return f"it was removed, moved or unmounted meanwhile: bring it back, {again}"
    return f"look at the file system and its logs, {again}"


def _free(path: Path) -> str:
    """Return how much room a file system has, as far as it says."""
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return f"{_disk.free(existing) / 2**20:.0f} MiB are free there"


@contextmanager
def replaced(path: Path, *, text: bool = False, mode: int | None = None) -> Iterator[IO[Any]]:
    """Give a new file to write to; it gets the name `path` when the block ends, whole and synced.

    An older file of that name stays as it is until then, and for good if the block raises (a full disk, for example).
    `text` means UTF-8. `mode` is the permission of the new file; the umask decides without it. Only one process may
    write a path at a time. Raises WriteFailed, an OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with explained(path):
            with _disk.open(partial, "w" if text else "wb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                yield file
                file.flush()
                _disk.sync(file.fileno(), partial)
            rename(partial, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to raise
            _disk.remove(partial)
        raise


def rename(old: Path, new: Path) -> None:
    """Rename a file or a folder in the same parent folder, replacing a file of that name, and sync the parent."""
    with explained(new):
        _disk.rename(old, new)
    sync(new.parent)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk. Raises WriteFailed."""
    with explained(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            _disk.sync(handle, path)
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Write every file of a folder, and the names in it, to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def remove_tree(folder: Path) -> None:
    """Delete a folder of which nothing is needed any more; what cannot be deleted is left there with a warning."""
    _disk.remove_tree(folder)
    if folder.exists():
        _log.warning("%s could not be deleted and takes room; delete it by hand", folder)
