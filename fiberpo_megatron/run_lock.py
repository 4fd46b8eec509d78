"""This module lets one run at a time write into a run folder, on any file system and from any machine.

<run folder>/lock/00000007 is the lock of the run that took the folder as the seventh; the highest number is in force.
The rules, and why they hold on NFS, where neither flock nor two clocks can be relied on:

- A run takes the lock by linking a finished file to the next number. link() never replaces a file, so one of several
  newcomers wins; each reads the file again to see which, because NFS may report a link that it made as a failure.
- Numbers never go down: a released lock stays, marked as released, and a newcomer deletes only lower numbers. So a
  process that was suspended in the middle of these steps cannot undo what others did in the meantime.
- The file names host, SLURM job and process of the holder. Where the process can be seen (same boot and PID namespace),
  /proc says whether it runs. Elsewhere the holder writes a beat into the file every few seconds, and a newcomer watches
  whether it changes. No two clocks are compared, and only reads that succeeded count as silence: neither a clock that
  jumps nor a file server that hangs makes a holder look dead.
- A holder finds out that it lost the folder (it was suspended for long, and another run took over) by a higher number.
  It looks with every beat, and before it saves or deletes checkpoints; it then stops.

It needs the standard library only.
"""

import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from fiberpo_megatron import durable
from fiberpo_megatron.closeable import Closeable
from fiberpo_megatron.printable import printable
from fiberpo_megatron.process_identity import ProcessIdentity, this_process

BEAT_S = 5.0
"""Seconds between two beats of a holder."""
POLL_S = 1.0
"""Seconds between two reads of a newcomer that watches for a beat."""
WATCH_S = 60.0
"""Seconds of reads without a change after which a holder that cannot be seen counts as dead: twelve beats."""
PROGRESS_S = 10.0

_NUMBER = re.compile(r"\d{8,}")
_CANDIDATE = ".new-"
_RELEASED = "released"
_LONGEST = 1 << 16
"""Bytes of a lock file that are read; a whole one has about 400."""
_STATE_WIDTH = 16
"""Characters of the last line, so that a beat replaces the one before in place."""

Say = Callable[[str], None]


class RunLocked(ValueError):
    """Another run writes into the folder."""


class RunLockLost(RuntimeError):
    """Another run has taken over the folder from this one."""


@dataclass(frozen=True)
class Holder:
    """Says who holds a lock."""

    process: ProcessIdentity
    job: str | None
    """SLURM_JOB_ID."""
    command: str
    """train, sft, dump or eval."""
    folder: str
    """The run folder as the holder sees it. A lock that was copied with its folder names another one."""
    since: str
    """When the lock was taken, by the holder's clock; for people."""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        process = self.process
        number = f"process {process.pid}{' of a container' if process.contained else ''}"
        text = f"`fiberpo {self.command}` on host {process.host}, {number}{job}, since {self.since}"
        return printable(text)

    def end(self) -> str:
        """Return how the holder is ended."""
        if self.process == this_process():
            return "it is a run of this process: close it"
        where = (
            f"inside of its container on {self.process.host}" if self.process.contained else f"on {self.process.host}"
        )
        return printable(f"scancel {self.job}" if self.job else f"kill {self.process.pid} {where}")


@dataclass(frozen=True)
class Look:
    """Says what a bystander sees of a run folder's lock, who takes nothing."""

    holder: Holder | None
    """None for a lock that is damaged."""
    released: bool
    runs: bool | None
    """Whether the holder's process runs; None if this process cannot see it."""
    content: bytes
    """It changes with every beat of a holder."""
    modified: float
    """Seconds since 1970 of the last beat, by the file server's clock."""


@dataclass(frozen=True)
class _Lock:
    """Is what a lock file says."""

    content: bytes
    holder: Holder | None
    """None for a file that is damaged, or whose content has not arrived."""
    token: str
    released: bool


class RunLock(Closeable):
    """Holds a run folder until it is closed. Make one with `take`."""

    def __init__(self, path: Path, lost: Callable[[RunLockLost], object], beat_s: float, say: Say) -> None:
        """Use `take`."""
        self._path, self._lost, self._beat_s, self._say = path, lost, beat_s, say
        self._file = os.open(path, os.O_RDWR)  # reopened by its name: NFS keeps a file that is deleted while open
        self._offset = os.fstat(self._file).st_size - _STATE_WIDTH
        self._beats = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RunLockLost if another run has taken over the folder. The file system is asked every time."""
        own = int(self._path.name)
        newest = _newest(self._path.parent)
        if newest == own:
            return
        folder = self._path.parent.parent
        lock = _read(self._path.with_name(_name(newest)))
        if newest < own:
            by = f"somebody deleted its lock ({self._path})"
        elif lock is None or lock.holder is None:
            by = "another run took over"
        else:
            by = f"{lock.holder} took over"
        raise RunLockLost(
            f"this run no longer has run.folder = {folder}: {by}, after this process had given no sign of life for "
            f"about {WATCH_S:.0f} s (was it suspended?). It stops before it writes there; continue with --resume when "
            "the other run has ended"
        )

    def close(self) -> None:
        """Give the folder back; idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        try:
            self._write(_RELEASED)
        except OSError as error:
            self._say(
                f"fiberpo: the lock {self._path} could not be released ({error}); it counts as free once this process "
                "has ended"
            )
        os.close(self._file)

    def _run(self) -> None:
        warned = False
        while not self._stopping.wait(self._beat_s):
            try:
                self.check()
                self._beats += 1
                self._write(f"beat {self._beats}")
                warned = False
            except RunLockLost as loss:
                self._lost(loss)
                return
            except OSError as error:
                if not warned:
                    self._say(
                        f"fiberpo: the lock {self._path} cannot be renewed ({error}); if that lasts for "
                        f"{WATCH_S:.0f} s, another run may take over the folder"
                    )
                warned = True

    def _write(self, state: str) -> None:
        """Replace the last line, and hand it to the file server."""
        os.pwrite(self._file, _state(state), self._offset)
        os.fsync(self._file)


def take(
    folder: Path,
    command: str,
    lost: Callable[[RunLockLost], object],
    *,
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
    beat_s: float = BEAT_S,
    poll_s: float = POLL_S,
    watch_s: float = WATCH_S,
) -> RunLock:
    """Take the lock of a run folder, which is made if it does not exist; close the lock when the run ends.

    `command` is what the run is for, for the message of others. `lost` is called in another thread if another run takes
    over; it should end the process. If the holder's process cannot be seen from here, its beats are watched for at most
    `watch_s` seconds, and `say` prints the progress. Raises RunLocked, naming the holder, and WriteFailed.
    """
    with durable.explained(folder / "lock"):
        return _take(folder, command, lost, say, beat_s, poll_s, watch_s)


def _take(
    folder: Path,
    command: str,
    lost: Callable[[RunLockLost], object],
    say: Say,
    beat_s: float,
    poll_s: float,
    watch_s: float,
) -> RunLock:
    locks = folder / "lock"
    locks.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(16)
    patience = time.monotonic() + 2 * watch_s
    while True:
        newest = _newest(locks)
        if newest:
            _wait_until_free(locks / _name(newest), folder, say, poll_s, watch_s)
        path = locks / _name(newest + 1)
        if _link(path, _text(folder, command, token), token) and _newest(locks) == newest + 1:
            _clean(locks, newest + 1)
            return RunLock(path, lost, beat_s, say)
        with suppress(FileNotFoundError):  # somebody else was faster: the next round says who
            if (lock := _read(path)) is not None and lock.token == token:
                path.unlink()
        if time.monotonic() > patience:
            raise RunLocked(f"run.folder = {folder}: other runs keep taking its lock ({locks}); try again later")
        time.sleep(poll_s / 10)


def refuse(folder: Path) -> None:
    """Raise RunLocked if a process that can be seen from here holds the folder. It takes nothing and waits for nothing:
    a quick check before a start."""
    locks = folder / "lock"
    try:
        lock = _read(locks / _name(_newest(locks)))
    except OSError:
        return  # `take` says what is wrong
    if lock is not None and _runs(lock, folder):
        raise _locked(folder, lock)


def look(folder: Path) -> Look | None:
    """Return what the lock of a folder says, or None if it has none. Raises OSError when it cannot be read."""
    path = folder / "lock" / _name(_newest(folder / "lock"))
    lock = _read(path)
    if lock is None:
        return None
    return Look(lock.holder, lock.released, _runs(lock, folder), lock.content, path.stat().st_mtime)


def holder_of(folder: Path) -> Holder | None:
    """Return who holds a run folder; None when it is free, or when the holder is seen to have ended.

    On another machine a holder that died without releasing the folder cannot be seen to have ended. Raises OSError.
    """
    seen = look(folder)
    return None if seen is None or seen.runs is False else seen.holder


def _wait_until_free(path: Path, folder: Path, say: Say, poll_s: float, watch_s: float) -> None:
    """Return when the lock is released or its holder is dead. Raises RunLocked when the holder lives."""
    lock = _read(path)
    if lock is None or lock.released:
        return
    runs = _runs(lock, folder)
    if runs:
        raise _locked(folder, lock)
    if runs is False:
        say(f"fiberpo: run.folder = {folder} is taken over: {lock.holder} has ended without releasing it")
        return
    who = lock.holder or f"a run whose lock {path} cannot be read"
    say(f"fiberpo: run.folder = {folder} is held by {who}; watching for a sign of life for {watch_s:.0f} s")
    silent, shown = 0.0, 0.0
    while silent < watch_s:
        time.sleep(poll_s)
        seen = _read(path)
        if seen is None or seen.released:
            return
        if seen.content != lock.content:
            raise _locked(folder, seen)
        silent += poll_s
        if silent - shown >= PROGRESS_S:
            shown = silent
            say(f"fiberpo: no sign of life from the holder for {silent:.0f} of {watch_s:.0f} s")
    say(f"fiberpo: run.folder = {folder} is taken over: {who} is dead")


def _runs(lock: _Lock, folder: Path) -> bool | None:
    """Return whether the holder runs, or None if this process cannot see it."""
    if lock.released:
        return False
    if lock.holder is None:
        return None
    runs = lock.holder.process.runs()
    return None if runs and lock.holder.folder != str(folder.resolve()) else runs  # a copy never changes


def _locked(folder: Path, lock: _Lock) -> RunLocked:
    holder = lock.holder
    end = f"stop it ({holder.end()})" if holder else "stop it"
    return RunLocked(
        f"run.folder = {folder} is in use by {holder or 'another run'}; wait until it has ended, {end}, or choose "
        "another folder with --run.folder"
    )


def _text(folder: Path, command: str, token: str) -> bytes:
    holder = Holder(
        process=this_process(),
        job=os.environ.get("SLURM_JOB_ID"),
        command=command,
        folder=str(folder.resolve()),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return json.dumps(asdict(holder) | {"token": token}).encode() + b"\n" + _state("beat 0")


def _state(state: str) -> bytes:
    return f"{state:<{_STATE_WIDTH - 1}}\n".encode()


def _link(path: Path, content: bytes, token: str) -> bool:
    """Make the file `path` with this content if no file of that name exists; return whether it is ours."""
    candidate = path.with_name(f"{_CANDIDATE}{token}")
    try:
        _create(candidate, content)
        try:
            os.link(candidate, path)
        except OSError:  # the name is taken, by another run or by this one (NFS repeats calls); or there are no links
            with suppress(FileExistsError):
                _create(path, content)
    finally:
        candidate.unlink(missing_ok=True)
    lock = _read(path)
    return lock is not None and lock.token == token


def _create(path: Path, content: bytes) -> None:
    """Make a new file, whole and synced, or none. Raises FileExistsError."""
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink()
            raise


def _clean(locks: Path, own: int) -> None:
    """Delete what earlier runs left behind."""
    for name in os.listdir(locks):
        if name.startswith(_CANDIDATE) or (_NUMBER.fullmatch(name) and int(name) < own):
            (locks / name).unlink(missing_ok=True)


def _newest(locks: Path) -> int:
    """Return the number of the lock that is in force; 0 if there is none.

    An NFS client may answer with a listing that is up to a minute old. That does no harm: a newcomer whose listing is
    old finds the next number taken, because link() asks the server, and after its own link the listing is fresh; a
    holder that was silent for so long that another run took over has no listing of before that.
    """
    try:
        return max((int(name) for name in os.listdir(locks) if _NUMBER.fullmatch(name)), default=0)
    except FileNotFoundError:
        return 0


def _name(number: int) -> str:
    return f"{number:08d}"


def _read(path: Path) -> _Lock | None:
    """Return what a lock file says, or None if it does not exist."""
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST)
    except FileNotFoundError:
        return None
    first, _, state = content.partition(b"\n")
    try:
        values = json.loads(first)
        token = values.pop("token")
        process = ProcessIdentity(**_of_types(ProcessIdentity, values.pop("process")))
        holder = Holder(process=process, **_of_types(Holder, values))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return _Lock(content, None, "", False)
    return _Lock(content, holder, token, state.strip() == _RELEASED.encode())


def _of_types(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values if each has the type of its field. Raises TypeError, KeyError."""
    types = get_type_hints(kind)
    for name, value in values.items():
        if not isinstance(value, types[name]):
            raise TypeError(f"{name} = {value!r}")
    return values
