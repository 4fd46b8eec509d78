"""This module finds which of a job's ranks failed first, and why: `python -m fiberpo_megatron.launch.failures FOLDER`.

FOLDER has errors/rank_<i>.json (what torch's error handler writes), rank_<i>.log and srun.log.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from fiberpo_megatron.printable import printable, tail
from fiberpo_megatron.types import EXIT_STOPPED

TAIL_LINES = 15
LONGEST_MESSAGE = 10_000
"""Characters of a rank's message that are shown."""
MOST_RANKS = 100_000
"""A range of more ranks in srun's log was not written by srun."""
ENDED = re.compile(
    r"^srun: error: [^:\n]*: tasks? ([0-9,-]{1,10000}): "
    r"(Killed|Terminated|Aborted|Segmentation fault|Bus error|Out Of Memory"
    rf"|Exited with exit code (?!{EXIT_STOPPED}\b)[0-9]+)",
    re.I | re.M,
)
"""How srun describes a task that failed. What the ranks write to stderr stands in the same file."""


def lost_a_peer(message: str) -> bool:
    """Return whether an error only says that another rank is gone."""
    return bool(re.search(r"gloo|NCCL|Connection (reset|closed)|rank \d+ failed|failed on rank \d+", message))


@dataclass(frozen=True, order=True)
class Failure:
    """Describes how one rank ended; the least in this order is the cause."""

    kind: int
    """0: an error of its own; 1: it ended without a message (killed, or before it could write one); 2: the loss of a
    peer."""
    seconds: float
    """Time of the error in seconds since 1970; without a message, its place among the ranks that srun names."""
    rank: int
    message: str


def failures(folder: Path) -> list[Failure]:
    """Return all ranks that failed, the cause first. A file of errors/ that holds no message is left out: a rank that
    was killed may have written half of it."""
    found = {}
    for path in (folder / "errors").glob("rank_*.json"):
        failure = _read(path)
        if failure is not None:
            found[failure.rank] = failure
    srun = folder / "srun.log"
    text = srun.read_text(encoding="utf-8", errors="replace") if srun.is_file() else ""
    for place, (ranks, how) in enumerate(ENDED.findall(text)):
        for rank in _expand(ranks):
            found.setdefault(rank, Failure(1, float(place), rank, f"ended without an error message ({how})"))
    return sorted(found.values())


def _read(path: Path) -> Failure | None:
    """The failure in a file of torch's error handler; None when it is not one."""
    try:
        rank = int(path.stem.removeprefix("rank_"))
        record = json.loads(path.read_bytes())["message"]
        if isinstance(record, str):  # without the time
            record = {"message": record}
        text = str(record["message"])
        seconds = float(record.get("extraInfo", {}).get("timestamp", 0))
        if not math.isfinite(seconds):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return Failure(2 if lost_a_peer(text) else 0, seconds, rank, text)


def explain(folder: Path) -> str:
    """Return the cause in one line, the end of that rank's log if the line is not enough, and the path of the log."""
    found = failures(folder)
    if not found:
        return f"fiberpo: no rank left a message; see the logs in {folder}"
    first = found[0]
    log = folder / f"rank_{first.rank}.log"
    lines = [f"fiberpo: rank {first.rank}: {shown(first.message)}"]
    if first.kind == 1 and log.exists():
        lines += quoted(log)
    return "\n".join([*lines, f"fiberpo: log of that rank: {log}"])


def shown(message: str) -> str:
    """Return a rank's message, safe to print and of bounded length."""
    cut = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."
    return printable(cut, keep="\n\t")


def quoted(log: Path) -> list[str]:
    """Return the last lines of a rank's log, safe to print and marked as quoted, or a line that says why there are
    none."""
    try:
        return [f"  | {line}" for line in tail(log, TAIL_LINES)]
    except OSError as error:
        return [f"  | (the log cannot be read: {error.strerror})"]


def _expand(ranks: str) -> list[int]:
    """Return SLURM's "0,2-4" as [0, 2, 3, 4]; parts that are no ranges of ranks are left out."""
    found: list[int] = []
    for part in ranks.split(","):
        low, _, high = part.partition("-")
        if (
            low.isdecimal()
            and (high or low).isdecimal()
            and len(high) < 10
            and int(high or low) - int(low) < MOST_RANKS
        ):
            found += range(int(low), int(high or low) + 1)
    return found


if __name__ == "__main__":
    print(explain(Path(sys.argv[1])), file=sys.stderr)
