"""This module follows the metrics of a run folder: it reads what was appended, and keeps the numbers as columns.

A file may be replaced or cut while it is followed, because a resumed run removes the records that it writes again. That
is recognised by the last bytes that were read: they no longer stand where they stood. The file is then read anew.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fiberpo_megatron.telemetry.sinks import METRICS_FILE, parse_record
from fiberpo_megatron.watch.inside import Outside, inside
from fiberpo_megatron.watch.table import Table, numeric

CHUNK = 1 << 21
"""Bytes that are read at once; between two chunks requests are answered."""
LONGEST_LINE = 1 << 24
"""Bytes of a line; a longer one is no record, and is skipped."""
MARK = 64
"""Bytes before the place up to which a file was read, by which it is recognised."""


@dataclass(frozen=True)
class Progress:
    """Says how far a file has been read."""

    read: int
    """Bytes."""
    size: int
    """Bytes of the file when it was last looked at."""

    @property
    def share(self) -> float:
        """Return the share of the file that was read, 1 of an empty one."""
        return self.read / self.size if self.size else 1.0


class FollowedRun:
    """Follows one run folder. `read` may be called by one thread while others ask for what was read so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        """Held while tables change, and by whoever reads several columns that have to fit together."""
        self.tables: dict[str, Table] = {}
        """Records by kind."""
        self.version = 0
        """Grows whenever records have come or gone."""
        self.odd_lines = 0
        """Whole lines that are no records."""
        self.problem = ""
        """Why the metrics cannot be read, if they cannot."""
        self.progress = Progress(0, 0)
        self._mark = b""
        self._skipping = False

    def read(self) -> bool:
        """Read the next chunk of what is new; return whether there may be more. It never raises OSError."""
        try:
            path = inside(self.folder, METRICS_FILE)
            if not path.is_file():
                self._forget(
                    f"{METRICS_FILE} does not exist yet" if not path.exists() else f"{METRICS_FILE} is no file"
                )
                return False
            with path.open("rb") as file:
                return self._read(file)
        except Outside as error:
            self._forget(str(error))
        except OSError as error:  # a file server that is away; what was read stays
            self.problem = f"{METRICS_FILE} cannot be read ({error})"
        return False

    def read_all(self) -> None:
        """Read until nothing is new."""
        while self.read():
            pass

    def _read(self, file: BinaryIO) -> bool:
        size = file.seek(0, 2)
        done = self.progress.read
        file.seek(max(0, done - MARK))
        if size < done or file.read(min(done, MARK)) != self._mark:
            self._forget("")
            done = 0
        file.seek(done)
        chunk = file.read(CHUNK)
        end = chunk.rfind(b"\n") + 1
        while not end and CHUNK <= len(chunk) < LONGEST_LINE and (more := file.read(CHUNK)):
            chunk += more
            end = chunk.rfind(b"\n") + 1
        self.problem = ""
        if not end and len(chunk) < LONGEST_LINE:  # half a line: its rest is still to come
            self.progress = Progress(done, size)
            return False
        self._take(chunk[:end] if end else chunk, whole=bool(end))
        done += end or len(chunk)
        self._mark = (self._mark + chunk[: end or len(chunk)])[-MARK:]
        self.progress = Progress(done, size)
        return done < size

    def _take(self, chunk: bytes, whole: bool) -> None:
        """Take the lines of a chunk; one that does not end in it is skipped up to its end."""
        lines = chunk.split(b"\n")[:-1] if whole else []
        if self._skipping and lines:
            del lines[0]
        self.odd_lines += 0 if whole or self._skipping else 1
        self._skipping = not whole
        blocks = list(self._blocks(line for line in lines if line.strip()))
        with self.lock:
            for kind, names, steps, rows in blocks:
                self.tables.setdefault(kind, Table()).extend(names, steps, rows)
            self.version += bool(blocks)

    def _blocks(self, lines: Iterable[bytes]) -> Iterable[tuple[str, tuple[str, ...], list[int], list[list[Any]]]]:
        """Yield (kind, metrics, steps, rows of values) of records that follow each other and have the same metrics."""
        open_blocks: dict[str, tuple[str, tuple[str, ...], list[int], list[list[Any]]]] = {}
        for line in lines:
            record = parse_record(line)
            if record is None:
                self.odd_lines += 1
                continue
            kind, step = record.pop("kind"), record.pop("step")
            values = numeric(record)
            names = tuple(values)
            block = open_blocks.get(kind)
            if block is None or block[1] != names:
                if block is not None:
                    yield block
                block = open_blocks[kind] = (kind, names, [], [])
            block[2].append(step)
            block[3].append(list(values.values()))
        yield from open_blocks.values()

    def _forget(self, problem: str) -> None:
        """Begin anew with an empty table."""
        with self.lock:
            self.version += bool(self.tables)
            self.tables = {}
        self.odd_lines, self.progress, self._mark, self._skipping = 0, Progress(0, 0), b"", False
        self.problem = problem


class Follower:
    """Reads several runs in a thread of its own until it is closed: every second what is new."""

    def __init__(self, runs: Iterable[FollowedRun], pause_s: float = 1.0) -> None:
        self._runs, self._pause_s = tuple(runs), pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._stopping.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            more = [run.read() for run in self._runs if not self._stopping.is_set()]
            self._stopping.wait(0.001 if any(more) else self._pause_s)
