"""Ask a running job for traces of its next steps: `fiberpo profile`."""

import argparse
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fiberpo_megatron.printable import printable
from fiberpo_megatron.run_lock import Holder, holder_of
from fiberpo_megatron.telemetry.profile_request import (
    PROFILES,
    REQUEST_FILE,
    ProfileRequest,
    ProfileStatus,
    read_status,
    write_request,
)

POLL_S = 0.5
PROGRESS_S = 15.0
ENGINE_PASSES = 50


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    about = "ask a running job for torch profiler traces of its next steps"
    parser = commands.add_parser("profile", help=about, description=f"{about}, without a restart. See docs/watch.md")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="training steps of a trace (default 1)")
    parser.add_argument(
        "--ranks", default="0", metavar="R", help="ranks that write a trace: 0,3 for example, or all (default 0)"
    )
    parser.add_argument("--engines", action="store_true", help="have every SGLang engine write a trace as well")
    parser.add_argument(
        "--engine-passes",
        type=int,
        default=ENGINE_PASSES,
        metavar="N",
        help=f"forward passes of an engine's trace, with --engines (default {ENGINE_PASSES})",
    )
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="S", help="seconds to wait for the traces (default 3600)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the request, wait for the traces and print where they are; return 1 when one could not be written."""
    folder: Path = options.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} does not exist")
    holder = _holder(folder)
    request = _request(options, _ready(folder, holder))
    try:
        write_request(folder, request)
    except OSError as error:
        raise ValueError(f"the request of a profile cannot be written: {error}") from error
    try:
        status = _wait(folder, request, holder, options.timeout, lambda text: print(text, file=sys.stderr, flush=True))
    except BaseException:
        _withdraw(folder, request)
        raise
    for name in status.files:
        print(printable(str(folder / PROFILES / name)))
    for problem in status.problems:
        print(printable(f"fiberpo: {problem}"), file=sys.stderr)
    if status.files:
        print("Open them at https://ui.perfetto.dev or in chrome://tracing", file=sys.stderr)
    return 1 if status.problems else 0


def _holder(folder: Path) -> Holder:
    holder = holder_of(folder)
    if holder is None:
        raise ValueError(
            f"no run writes into {folder} now, so that there is nothing to profile; start it, or continue it with "
            "--resume, and ask again"
        )
    if holder.command != "train":
        raise ValueError(f"{folder} is held by {holder}; only the steps of `fiberpo train` can be profiled")
    return holder


def _ready(folder: Path, holder: Holder) -> ProfileStatus:
    """Return the status of a run that takes requests."""
    if (folder / REQUEST_FILE).exists():
        raise ValueError(
            f"another profile of {folder} is pending; wait until it is written, or delete {folder / REQUEST_FILE} if "
            "no command waits for it"
        )
    status = read_status(folder)
    if status is None:
        raise ValueError(
            f"{holder} takes no requests of profiles yet; if it still starts, ask again after its first step. A run of "
            "an earlier version takes them when it is continued with --resume"
        )
    return status


def _request(options: argparse.Namespace, status: ProfileStatus) -> ProfileRequest:
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: give a number of training steps from 1 on")
    if options.engine_passes < 1:
        raise ValueError(f"--engine-passes {options.engine_passes}: give a number of forward passes from 1 on")
    if options.engines and not status.engines:
        raise ValueError("--engines: this run samples from no engine (storage.replay); leave the option out")
    passes = options.engine_passes if options.engines else 0
    return ProfileRequest(secrets.token_hex(8), options.steps, _ranks(options.ranks, status.ranks), passes)


def _ranks(text: str, count: int) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(count))
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--ranks {text}: give ranks with commas between them, such as 0,3, or all")
    ranks = sorted({int(word) for word in words})
    if ranks[-1] >= count:
        known = "rank 0 alone" if count == 1 else f"ranks 0 to {count - 1}"
        raise ValueError(f"--ranks {text}: rank {ranks[-1]} does not exist, the run has {known}")
    return tuple(ranks)


def _wait(
    folder: Path, request: ProfileRequest, holder: Holder, timeout_s: float, say: Callable[[str], None]
) -> ProfileStatus:
    """Return the status that answers the request. Raises ValueError when the run ends or the time is over."""
    began, shown = time.monotonic(), -PROGRESS_S
    while True:
        ended = holder_of(folder) is None  # asked first: what a run wrote before it ended is there then
        status = read_status(folder)
        if status is not None and status.id == request.id and status.state == "done":
            return status
        waits = _waits_for(request, status)
        if ended:
            raise ValueError(f"{holder} has ended while this command waited {waits}")
        waited = time.monotonic() - began
        if waited > timeout_s:
            raise ValueError(
                f"after {waited:.0f} s this command still waits {waits}; the run is {holder}. {_left(request, status)} "
                "Give a larger --timeout if its steps take that long"
            )
        if waited - shown >= PROGRESS_S:
            shown = waited
            say(printable(f"Waiting {waits} ({waited:.0f} s) ..."))
        time.sleep(POLL_S)


def _waits_for(request: ProfileRequest, status: ProfileStatus | None) -> str:
    if status is None or status.id != request.id:
        return "for the next step to begin"
    last = status.step + request.steps - 1
    return (
        f"for the traces of step {last}" if request.steps == 1 else f"for the traces of steps {status.step} to {last}"
    )


def _left(request: ProfileRequest, status: ProfileStatus | None) -> str:
    begun = status is not None and status.id == request.id
    return f"The traces will still be written to {PROFILES}/." if begun else "The request is withdrawn."


def _withdraw(folder: Path, request: ProfileRequest) -> None:
    """Delete the request if the run has not begun with it."""
    status = read_status(folder)
    if status is None or status.id != request.id:
        (folder / REQUEST_FILE).unlink(missing_ok=True)
