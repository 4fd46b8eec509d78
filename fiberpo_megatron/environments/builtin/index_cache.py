"""This module keeps where the problems of large data sets stand, in the user's cache folder.

The folder is $XDG_CACHE_HOME/fiberpo-megatron/prompts (~/.cache by default). Its files may be deleted at any time; what
was not used for USED_DAYS is deleted when something new is written. Without a writable folder everything works, but
each worker reads each data set anew.

It imports the standard library alone, because it runs in the workers of environments.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

CACHED_ROWS = 50_000
"""Smaller data sets are read anew by every worker, in about half a second."""
USED_DAYS = 60
_FORMAT = 1


@dataclass(frozen=True)
class Index:
    """Says where each problem stands. The sequences have one number for each problem, in the problems' order."""

    starts: Sequence[int] = field(default_factory=lambda: array("Q"))
    """First byte of its line."""
    lengths: Sequence[int] = field(default_factory=lambda: array("I"))
    """Bytes of its line."""
    rows: Sequence[int] = field(default_factory=lambda: array("I"))
    """Its number among the rows of the data set, from 0."""
    numbers: Sequence[int] = field(default_factory=lambda: array("I"))
    """The number of its line in the file, from 1."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that each filter has left out."""

    def __len__(self) -> int:
        return len(self.starts)

    def ordered(self, order: Sequence[int] | None) -> Index:
        """Return the index with the problems in this order of positions; None leaves them as they are."""
        if order is None:
            return self
        starts, lengths, rows, numbers = (array("Q", (column[i] for i in order)) for column in self.columns())
        return Index(starts, array("I", lengths), array("I", rows), array("I", numbers), self.left_out)

    def columns(self) -> tuple[Any, ...]:
        """Return the four sequences."""
        return self.starts, self.lengths, self.rows, self.numbers


def identity(path: Path) -> list[Any]:
    """Return what changes when a file does. Raises OSError."""
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


class IndexCache:
    """Keeps one index, and the lines that it points into where these are not the data set's own.

    `key` says all that the index depends on.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        name = blake2b(f"{_FORMAT} {key}".encode(), digest_size=16).hexdigest()
        self._folder = _folder()
        self._index_path = None if self._folder is None else self._folder / f"{name}.index"
        self._lines_path = None if self._folder is None else self._folder / f"{name}.lines"

    def load(self, *, lines: bool) -> tuple[Index, IO[bytes] | None] | None:
        """Return the index and, if `lines`, the open file that it points into; None if they are not kept."""
        if self._index_path is None or self._lines_path is None:
            return None
        try:
            with self._index_path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = self._lines_path.open("rb") if lines else None
            for path in (self._index_path, *([self._lines_path] if lines else [])):
                os.utime(path)
            header = json.loads(memory[: memory.find(b"\n")])
        except (OSError, ValueError):  # it is not there, or it is damaged
            return None
        count, begin = header.get("count", 0), header.get("begin", 0)
        if header.get("key") != self._key or len(memory) != begin + 20 * count:
            return None
        starts = memoryview(memory)[begin : begin + 8 * count].cast("Q")
        rest = memoryview(memory)[begin + 8 * count :].cast("I")
        lengths, rows, numbers = (rest[at * count : (at + 1) * count] for at in range(3))
        return Index(starts, lengths, rows, numbers, header["left_out"]), found

    def new_lines(self) -> IO[bytes]:
        """Return a new file for lines; `keep` gives it its name, and without that it disappears with its last user."""
        return tempfile.TemporaryFile(dir=self._folder)

    def keep(self, index: Index, lines: IO[bytes] | None) -> bool:
        """Keep an index, and the lines that it points into where there are some; return whether that was possible."""
        if self._folder is None or self._index_path is None or self._lines_path is None:
            return False
        header: dict[str, Any] = {"key": self._key, "count": len(index), "left_out": dict(index.left_out), "begin": 0}
        header["begin"] = -(-(len(json.dumps(header)) + 32) // 64) * 64
        try:
            _delete_unused(self._folder)
            if lines is not None:
                lines.seek(0)
                with _replaced(self._lines_path) as file:
                    while part := lines.read(1 << 20):
                        file.write(part)
            with _replaced(self._index_path) as file:
                file.write(json.dumps(header).encode().ljust(header["begin"] - 1) + b"\n")
                for column in index.columns():
                    file.write(column.tobytes())
        except OSError as error:
            print(f"the index of prompts cannot be kept in {self._folder}: {error}; going on without", file=sys.stderr)
            return False
        return True


def _folder() -> Path | None:
    """Return the folder of all indices, or None if it cannot be written."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "fiberpo-megatron" / "prompts"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or a file system that is only read
        return None
    return folder if os.access(folder, os.W_OK) else None


def _delete_unused(folder: Path) -> None:
    """Delete files that were not used for USED_DAYS, and what processes that were ended have left half written."""
    now = time.time()
    for path in folder.iterdir():
        days = 1 if path.suffix == ".partial" else USED_DAYS
        with suppress(FileNotFoundError):  # another process is quicker
            if now - path.stat().st_mtime > days * 86400:
                path.unlink()


@contextmanager
def _replaced(path: Path) -> Iterator[IO[bytes]]:
    """Give a new file to write to, which gets the name `path` when it is whole. Any number of processes may do so."""
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to raise
            os.unlink(partial)
        raise
