"""This module holds what `fiberpo profile` and a run say to each other, as files of the run folder.

The command writes `profile_request.json`; the run reads it at its next step, deletes it when the profile is done, and
keeps `profiles/status.json` up to date: `ready` since its start, then `running`, then `done` with the names of the
traces. Both files appear whole. The traces lie beside the status, in `profiles/`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fiberpo_megatron import durable
from fiberpo_megatron.json_files import read_object

REQUEST_FILE = "profile_request.json"
PROFILES = "profiles"
STATUS_FILE = "status.json"

State = Literal["ready", "running", "done"]


@dataclass(frozen=True)
class ProfileRequest:
    """Says what is to be profiled."""

    id: str
    """Distinguishes this request from others."""
    steps: int
    """Training steps that a trace covers."""
    ranks: tuple[int, ...]
    """Ranks that write a trace, each its own."""
    engine_passes: int = 0
    """Forward passes that every engine writes a trace of; 0 asks the engines for none."""


@dataclass(frozen=True)
class ProfileStatus:
    """Says what became of the last request."""

    state: State
    ranks: int
    """Ranks that the run has."""
    engines: int
    """Engines that the run samples from."""
    id: str = ""
    """That of the request, except in the state `ready`."""
    step: int = 0
    """First step that is profiled."""
    files: tuple[str, ...] = ()
    """Names of the traces in `profiles/`."""
    problems: tuple[str, ...] = ()
    """Traces that could not be written, a sentence each."""


def trace_name(step: int, rank: int) -> str:
    """Return the name of a rank's trace that begins with training step `step`."""
    return f"step-{step:06d}-rank-{rank:05d}.json.gz"


def write_request(run_folder: Path, request: ProfileRequest) -> None:
    """Write the request of a profile. Raises WriteFailed, an OSError."""
    with durable.replaced(run_folder / REQUEST_FILE, text=True) as file:
        json.dump(asdict(request), file)


def read_request(run_folder: Path) -> ProfileRequest:
    """Return the pending request. Raises OSError where there is none, and ValueError when the file is none."""
    path = run_folder / REQUEST_FILE
    found = read_object(path)
    try:
        request = ProfileRequest(
            id=_text(found["id"]),
            steps=_whole(found["steps"], 1),
            ranks=tuple(_whole(rank, 0) for rank in _list(found["ranks"])),
            engine_passes=_whole(found["engine_passes"], 0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no request of a profile ({type(error).__name__}: {error}); delete it") from error
    return request


def write_status(run_folder: Path, status: ProfileStatus) -> None:
    """Replace the status. Raises WriteFailed, an OSError."""
    folder = run_folder / PROFILES
    with durable.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with durable.replaced(folder / STATUS_FILE, text=True) as file:
        json.dump(asdict(status), file)


def read_status(run_folder: Path) -> ProfileStatus | None:
    """Return the status, or None when no run has written one. Raises ValueError for a file that is none."""
    path = run_folder / PROFILES / STATUS_FILE
    if not path.exists():
        return None
    found = read_object(path)
    try:
        return _status(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no status of profiles ({type(error).__name__}: {error}); delete it") from error


def _status(found: Mapping[str, Any]) -> ProfileStatus:
    if found["state"] not in get_args(State):
        raise ValueError(f"state = {found['state']!r}")
    return ProfileStatus(
        state=found["state"],
        ranks=_whole(found["ranks"], 1),
        engines=_whole(found["engines"], 0),
        id=_text(found["id"]),
        step=_whole(found["step"], 0),
        files=tuple(_text(name) for name in _list(found["files"])),
        problems=tuple(_text(problem) for problem in _list(found["problems"])),
    )


def _whole(value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no whole number from {least} on")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value
