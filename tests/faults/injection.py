"""Faults of a file system: every change that a program makes below a folder is seen, and one kind of it can fail.

A change is a *site*: an operation ("open", "write", "sync", "rename", "make folder", "remove", "read") and the path
below the folder with its numbers left out, such as ("write", "rollouts/step_N.jsonl").
"""

import builtins
import errno
import io
import os
import platform
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

TORN = 7
"""Bytes that a full disk still takes."""


class Site(NamedTuple):
    """Names a place that changes a folder, or reads from it."""

    operation: str
    path: str


@dataclass
class Faults:
    """Counts what happens below `folder`; once `site` has come up `after` times, each further time fails.

    The errors of one thread are those of all: a full disk is full for everybody.
    """

    folder: Path
    site: Site | None = None
    error: int = errno.ENOSPC
    after: int = 0
    seen: Counter[Site] = field(default_factory=Counter)
    hits: int = 0
    """How often the fault was raised."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, path: Any) -> str | None:
        """Return the path below the folder with its numbers and host left out; None for other paths and open files."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        text = os.path.abspath(os.fsdecode(path))
        root = f"{self.folder}{os.sep}"
        below = text.removeprefix(root).replace(platform.node(), "HOST")
        below = re.sub(r"\.new-[0-9a-f]+", ".new-TOKEN", below)
        return re.sub(r"\d+", "N", below) if text.startswith(root) else None

    def come_up(self, operation: str, path: Any) -> bool:
        """Count an operation; return whether it has to fail."""
        place = self.place(path)
        if place is None:
            return False
        site = Site(operation, place)
        with self._lock:
            self.seen[site] += 1
            failing = site == self.site and self.seen[site] > self.after
            self.hits += failing
        return failing

    def fail(self, operation: str, path: Any) -> None:
        """Raise the fault where its turn has come."""
        if self.come_up(operation, path):
            raise OSError(self.error, os.strerror(self.error), os.fsdecode(path))

    def failure(self) -> OSError:
        """Return the error of a write or a sync, which names no file."""
        return OSError(self.error, os.strerror(self.error))


class _Watched(io.FileIO):
    """A file whose writes may fail, after a few bytes that a full disk still takes."""

    def __init__(self, path: Any, mode: str, faults: Faults) -> None:
        super().__init__(path, mode)
        self._faults, self._room = faults, TORN

    def write(self, data: Any, /) -> int:
        if not self._faults.come_up("write", self.name):
            return super().write(data)
        if self._room:
            taken, self._room = self._room, 0
            return super().write(memoryview(data).cast("B")[:taken])
        raise self._faults.failure()


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Let the faults of a folder happen inside the block, in all threads of this process."""
    real_open, real_os_open, real_sync = io.open, os.open, os.fsync

    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **named: Any) -> Any:
        writes = bool(set(mode) & set("wax+"))
        faults.fail("open" if writes else "read", file)
        if writes and faults.place(file):
            raw = _Watched(file, mode.replace("b", "").replace("t", ""), faults)
            buffer = io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding=encoding)
        return real_open(file, mode, buffering, encoding, *rest, **named)

    def os_opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            faults.fail("open", path)
        return real_os_open(path, flags, *rest, **named)

    def synced(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        if faults.come_up("sync", os.readlink(f"/proc/self/fd/{number}")):
            raise faults.failure()
        real_sync(handle)

    def guarded(operation: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            if operation != "make folder" or not os.path.isdir(path):  # the kernel says first that it exists
                faults.fail(operation, rest[0] if operation == "rename" else path)
            return real(path, *rest, **named)

        return call

    names = {
        "replace": "rename",
        "rename": "rename",
        "link": "rename",
        "mkdir": "make folder",
        "unlink": "remove",
        "rmdir": "remove",
    }
    patched: list[tuple[Any, str, Any]] = [
        (io, "open", opened),
        (builtins, "open", opened),
        (os, "open", os_opened),
        (os, "fsync", synced),
        *((os, name, guarded(operation, getattr(os, name))) for name, operation in names.items()),
    ]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in patched]
    for holder, name, replacement in patched:
        setattr(holder, name, replacement)
    try:
        yield faults
    finally:
        for holder, name, original in before:
            setattr(holder, name, original)
