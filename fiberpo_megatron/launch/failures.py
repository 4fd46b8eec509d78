"""This module finds which of a job's ranks failed first, and why: `python -m fiberpo_megatron.launch.failures FOLDER`.

FOLDER has errors/rank_<i>.json (what torch's error handler writes), rank_<i>.log and srun.log.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from fiberpo_megatron.types import EXIT_STOPPED

TAIL_LINES = 15
ENDED = re.compile(
    r"tasks? ([\d,-]+): "
    r"(Killed|Terminated|Aborted|Segmentation fault|Bus error|Out Of Memory"
    rf"|Exited with exit code (?!{EXIT_STOPPED}\b)\d+)",
    re.I,
)
"""How srun describes a task that failed."""


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
    """Return all ranks that failed, the cause first."""
    found = {}
    for path in (folder / "errors").glob("rank_*.json"):
        record = json.loads(path.read_text())["message"]
        text, extra = record["message"], record.get("extraInfo", {})
        rank = int(path.stem.removeprefix("rank_"))
        found[rank] = Failure(2 if lost_a_peer(text) else 0, float(extra.get("timestamp", 0)), rank, text)
    srun = folder / "srun.log"
    for place, (ranks, how) in enumerate(ENDED.findall(srun.read_text(errors="replace") if srun.exists() else "")):
        for rank in _expand(ranks):
            found.setdefault(rank, Failure(1, float(place), rank, f"ended without an error message ({how})"))
    return sorted(found.values())


def explain(folder: Path) -> str:
    """Return the cause in one line, the end of that rank's log if the line is not enough, and the path of the log."""
    found = failures(folder)
    if not found:
        return f"fiberpo: no rank left a message; see the logs in {folder}"
    first = found[0]
    log = folder / f"rank_{first.rank}.log"
    lines = [f"fiberpo: rank {first.rank}: {first.message}"]
    if first.kind == 1 and log.exists():
        lines += [f"  | {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]]
    return "\n".join([*lines, f"fiberpo: log of that rank: {log}"])


def _expand(ranks: str) -> list[int]:
    """Return SLURM's "0,2-4" as [0, 2, 3, 4]."""
    parts = [part.partition("-") for part in ranks.split(",") if part]
    return [rank for low, _, high in parts for rank in range(int(low), int(high or low) + 1)]


if __name__ == "__main__":
    print(explain(Path(sys.argv[1])), file=sys.stderr)
