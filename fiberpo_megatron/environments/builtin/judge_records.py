"""This module keeps what a judge has said and cost in an SQLite file, which all workers and later runs share.

It imports the standard library alone.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

LOCK_S = 10.0
"""How long another process may hold the file's lock."""
TABLES = """
CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT NOT NULL, written REAL NOT NULL);
CREATE TABLE IF NOT EXISTS spending (written REAL NOT NULL, input INTEGER NOT NULL, output INTEGER NOT NULL,
                                     price REAL NOT NULL);
"""


class JudgeRecords:
    """Holds replies by their whole request, and what requests have cost.

    path: the file; None keeps everything in the memory of this process. Raises ValueError when it cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(":memory:" if path is None else path, timeout=LOCK_S, isolation_level=None)
            self._database.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"cache = {str(path)!r} cannot be used as an SQLite file: {error}; name another") from None

    def reply(self, key: str) -> str | None:
        """Return the reply to a request that was asked before."""
        found = self._database.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def keep(self, key: str, reply: str) -> None:
        """Keep the reply to a request; the first one stays."""
        self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, reply, time.time()))

    def spend(self, tokens_in: int, tokens_out: int, price: float) -> None:
        """Note what a request has cost, whether its reply was of use or not."""
        self._database.execute("INSERT INTO spending VALUES (?, ?, ?, ?)", (time.time(), tokens_in, tokens_out, price))

    @property
    def spent(self) -> float:
        """Return what all requests of the file have cost."""
        return float(self._database.execute("SELECT TOTAL(price) FROM spending").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def request_key(address: str, body: Mapping[str, Any]) -> str:
    """Return a digest of everything that a request says, except for its key."""
    return sha256(json.dumps([address, body], sort_keys=True).encode()).hexdigest()
