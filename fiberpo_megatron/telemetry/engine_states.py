"""This module reads and writes `engines.json` of a run folder: the last known state of every rollout engine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fiberpo_megatron import durable
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.printable import printable

ENGINES_FILE = "engines.json"
State = Literal["starting", "joining", "serving", "not answering", "quarantined", "left"]
"""starting: its server does not answer yet. joining: it answers, and gets the weights with a publication. serving: it
holds the current weights and gets requests. not answering: it died or hangs. quarantined: it did not compute what the
trainer computes. left: it was taken out of the run."""


@dataclass(frozen=True)
class EngineState:
    """Holds how one engine is, and what it said about its load; None stands for what it did not say."""

    address: str
    """http://host:port; empty while it has none."""
    state: State
    detail: str = ""
    """Why it is not serving, in one sentence."""
    number: int | None = None
    """The engine's number, which stays with its place, whichever server is in it."""
    generation: int | None = None
    """How often it has joined the run again."""
    since: float | None = None
    """When it came into its state (s since 1970)."""
    weight_version: str | None = None
    """Version of the weights that it serves: the number of steps that made them."""
    running: int | None = None
    """Requests that it decodes."""
    queued: int | None = None
    """Requests that wait in its queue."""
    token_usage: float | None = None
    """Share of the KV cache that is in use."""
    cache_hit_rate: float | None = None
    """Share of the prompt tokens that the prefix cache had, over the engine's last interval of statistics."""
    generation_tokens_per_second: float | None = None
    """Rate of the engine's last decoding batches."""
    answered_in_s: float | None = None
    """Seconds until its answer came."""


@dataclass(frozen=True)
class EngineStates:
    """Holds the states of all engines after one step."""

    step: int
    """Training step, from 0, after which the engines were asked."""
    time: float
    """Seconds since 1970 at which they were asked."""
    engines: tuple[EngineState, ...]


def write_engine_states(run_folder: Path, states: EngineStates) -> None:
    """Replace `engines.json`, whole. Raises WriteFailed, an OSError."""
    with durable.replaced(run_folder / ENGINES_FILE, text=True) as file:
        json.dump(asdict(states), file, indent=1)
        file.write("\n")


def read_engine_states(run_folder: Path) -> EngineStates | None:
    """Return the last states of a run's engines; None without a file.

    Raises ValueError for a file that does not hold them, and OSError for one that cannot be opened.
    """
    path = run_folder / ENGINES_FILE
    if not path.is_file():
        return None
    found = read_object(path)
    try:
        engines = found["engines"]
        if not isinstance(engines, Sequence) or isinstance(engines, str):
            raise TypeError("engines is no list")
        return EngineStates(int(found["step"]), float(found["time"]), tuple(_engine(one) for one in engines))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the states of engines ({type(error).__name__}: {error})") from error


def _engine(found: Mapping[str, Any]) -> EngineState:
    state: State = found["state"] if found["state"] in get_args(State) else "not answering"
    numbers = {
        field.name: _number(found.get(field.name))
        for field in fields(EngineState)
        if field.name not in ("address", "state", "detail", "weight_version")
    }
    integers = ("running", "queued", "number", "generation")
    counts = {name: None if numbers[name] is None else int(numbers[name]) for name in integers}  # type: ignore[arg-type]
    version = found.get("weight_version")
    return EngineState(
        **{**numbers, **counts},  # type: ignore[arg-type]
        address=printable(str(found["address"])),
        state=state,
        detail=printable(str(found.get("detail", ""))),
        weight_version=None if version is None else printable(str(version)),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
