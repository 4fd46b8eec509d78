"""This module has a disk that may be full, and that loses what was not synced when its machine is lost."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import IO, Any

from fiberpo_megatron.durable import Disk


class SimulatedDisk(Disk):
    """It is the disk below `folder`, which is a real folder. `event` is called before each change, with what it is and
    the file's name; it may raise.

    A file's content is safe once the file has been synced, and its name once its folder has been. Folders are safe at
    once: file systems write them with the files in them.
    """

    def __init__(self, folder: Path, event: Callable[[str, str], None]) -> None:
        self.folder, self._event = folder, event
        self._safe: dict[Path, bytes] = {}
        """What the files hold after the machine was lost, whatever happens."""
        self._synced: set[Path] = set()
        """Files whose present content is safe under some name."""
        self.unsynced: set[Path] = set()
        """Files and folders whose last sync failed."""
        self._kept: dict[Path, bytes] | None = None

    def open(self, path: Path, mode: str) -> IO[Any]:
        self._event("open", path.name)
        self._synced.discard(path)
        return super().open(path, mode)

    def sync(self, handle: int, path: Path) -> None:
        try:
            self._event("sync", path.name)
        except OSError:
            self.unsynced.add(path)
            raise
        self.unsynced.discard(path)
        if path.is_dir():
            for file in {*self._safe, *_files(path)}:
                if file.parent == path:
                    self._sync_name(file)
        else:
            self._synced.add(path)
            if path in self._safe:
                self._safe[path] = path.read_bytes()

    def _sync_name(self, file: Path) -> None:
        if not file.exists():
            del self._safe[file]
        elif file in self._synced:
            self._safe[file] = file.read_bytes()
        else:
            self._safe.setdefault(file, b"")

    def rename(self, old: Path, new: Path) -> None:
        self._event("rename", new.name)
        super().rename(old, new)
        (self._synced.add if old in self._synced else self._synced.discard)(new)
        self._synced.discard(old)

    def remove(self, path: Path) -> None:
        self._event("remove", path.name)
        super().remove(path)

    def remove_tree(self, folder: Path) -> None:
        self._event("remove", folder.name)
        super().remove_tree(folder)

    def free(self, folder: Path) -> int:
        """Return nothing: it is asked only after the disk was full, and the real disk would differ from run to run."""
        return 0

    def freeze(self, machine: Random | None) -> None:
        """Keep what the disk holds now: what the running process does from here on never happened. `machine` draws what
        is left of what was not safe where the whole machine is lost; None: the kernel lives on and writes all."""
        current = {file: file.read_bytes() for file in _files(self.folder)}
        self._kept = current if machine is None else self._after(current, machine)

    def thaw(self) -> None:
        """Have the disk as it was kept."""
        assert self._kept is not None
        for entry in self.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path, content in self._kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self._safe, self._synced, self._kept = self._kept, set(self._kept), None
        self.unsynced = set()

    def _after(self, current: dict[Path, bytes], machine: Random) -> dict[Path, bytes]:
        """Return what a lost machine leaves of the files."""
        left: dict[Path, bytes] = {}
        for path in sorted({*current, *self._safe}):
            options = [self._safe.get(path), current.get(path)]
            if path in current and path not in self._synced:
                content = current[path]
                options.append(content[: machine.randrange(len(content) + 1)])
                options.append(bytes(len(content)))  # its size had been written, and not its blocks
            found = options[0] if options[0] == options[1] else machine.choice(options)
            if found is not None:
                left[path] = found
        return left


def full(path: Path | str) -> OSError:
    """Return the error of a disk that takes nothing more."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
