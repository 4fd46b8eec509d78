"""This module reads and writes what is recorded of single tokens: <run>/tokens/step_000012.jsonl.gz.

Each line is a JSON object about one trajectory; docs/watch.md lists its entries. Lists have one entry for each token
after the prompt, null where there is no figure: at tokens that an environment wrote, above all.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.printable import json_line
from fiberpo_megatron.telemetry.step_files import StepFiles

VERSION = 1
TOKENS = StepFiles("tokens", "step", ".jsonl.gz")
LONGEST_LINE = 64 << 20
"""Bytes of a line that is still read: the record of a trajectory of some 100,000 tokens."""
COMPRESSION = 1
"""Level of gzip: 3 takes two and a half times as long and saves a twentieth."""


def write_tokens(run_folder: Path, step: int, records: Sequence[Mapping[str, Any]], *, keep: int) -> Path:
    """Write the records of a step's trajectories.

    A file of the same step is replaced (a resumed step). Files of earlier steps are deleted when there are more than
    `keep`, see `StepFiles.prune`. Raises OSError.
    """
    path = TOKENS.path(run_folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        durable.replaced(path) as file,
        gzip.GzipFile("", "wb", compresslevel=COMPRESSION, fileobj=file, mtime=0) as packed,
    ):
        for record in records:
            packed.write(json_line({"version": VERSION, **record}).encode() + b"\n")
    TOKENS.prune(run_folder, keep)
    return path


def read_tokens(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records of a step's file, and sentences about what in it could not be read."""
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        for number, line in _lines(path):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("trajectory"), int):
                problems.append(f"tokens/{path.name}: line {number} is no record of a trajectory")
            elif record.get("version") != VERSION:
                problems.append(
                    f"tokens/{path.name}: line {number} has version {record.get('version')!r} of the format, and this "
                    f"package reads {VERSION}; use the package that wrote it"
                )
            else:
                records.append(record)
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"tokens/{path.name} cannot be read to its end ({type(error).__name__}: {error})")
    return records, problems


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with gzip.open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if line.strip():
                yield number, line
