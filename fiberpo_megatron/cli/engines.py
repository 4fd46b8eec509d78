"""Show the engines of a run as a table: `fiberpo engines RUN`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron.telemetry.engine_states import ENGINES_FILE, EngineState, EngineStates, read_engine_states

COLUMNS = ("engine", "address", "state", "for", "generation", "weights", "running", "queued", "cache", "tokens/s")


def add_parser(commands: Any) -> None:
    """Add the command and its argument."""
    about = "show the engines of a run as a table"
    parser = commands.add_parser(
        "engines",
        help=about,
        description=f"{about}: their states, weights and load after the last step or publication, from the run folder "
        "alone. See docs/rollouts.md",
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")


def run(options: argparse.Namespace) -> int:
    """Print the table; return 1 when an engine serves nothing that should, else 0."""
    if not options.folder.is_dir():
        raise FileNotFoundError(f"run folder {options.folder} does not exist")
    states = read_engine_states(options.folder)
    if states is None:
        raise ValueError(
            f"{options.folder} has no {ENGINES_FILE}: its run has not published weights yet, or has no engines"
        )
    now = time.time()
    sys.stdout.write(table(states, now))
    wanted = [engine for engine in states.engines if engine.state != "left"]
    return 0 if all(engine.state == "serving" for engine in wanted) else 1


def table(states: EngineStates, now: float) -> str:
    """Return the table as text. `now`: seconds since 1970."""
    rows = [COLUMNS, *(_row(number, engine, now) for number, engine in enumerate(states.engines))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    after = f"after step {states.step}" if states.step >= 0 else "before the first step"
    lines.append(f"As of {_duration(now - states.time)} ago, {after}.")
    why = [f"engine {_text(engine.number)}: {engine.detail}" for engine in states.engines if engine.detail]
    return "\n".join([*lines, *why]) + "\n"


def _row(position: int, engine: EngineState, now: float) -> Sequence[str]:
    return (
        _text(position if engine.number is None else engine.number),
        engine.address or "-",
        engine.state,
        "-" if engine.since is None else _duration(now - engine.since),
        _text(engine.generation),
        _text(engine.weight_version),
        _text(engine.running),
        _text(engine.queued),
        "-" if engine.token_usage is None else f"{engine.token_usage:.0%}",
        "-" if engine.generation_tokens_per_second is None else f"{engine.generation_tokens_per_second:.0f}",
    )


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves at least 1."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
