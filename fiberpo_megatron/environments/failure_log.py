"""This module keeps the records of what failed in an environment, in a file of bounded size."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT_BYTES = 16 << 20
"""Size of the file after which no more records are written; metrics count all failures."""


class FailureLog:
    """Appends records as JSON lines until the file is full. A disk that takes no record does not end the run.

    path: None keeps no file. The file of an earlier start of the run is continued.
    """

    def __init__(self, path: Path | None, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path, self._limit = path, limit_bytes
        self._size: int | None = None
        self._lost = False

    def write(self, record: Mapping[str, Any]) -> bool:
        """Append one record; return whether it was written or left out on purpose, and not lost.

        The first record that the file system refuses is reported on stderr.
        """
        if self._path is None:
            return True
        line = json.dumps(record) + "\n"
        try:
            if self._size is None:
                self._size = self._path.stat().st_size if self._path.exists() else 0
            if self._size >= self._limit:
                return True
            self._size += len(line)
            if self._size >= self._limit:
                line += json.dumps({"note": "the file is full: later failures are counted in the metrics alone"}) + "\n"
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if not self._lost:
                print(
                    f"WARNING: {self._path} cannot be written ({error.strerror}): failures of the environment are "
                    "counted in the metrics, but their records are lost. Make room, or make the folder writable",
                    file=sys.stderr,
                    flush=True,
                )
            self._lost = True
            return False
        return True
