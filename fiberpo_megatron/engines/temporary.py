"""This module gives every server a temporary folder, for the sockets and files that SGLang leaves behind."""

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fiberpo_megatron.process_identity import boot_id

_ATTEMPTS = 100


@dataclass(frozen=True)
class TemporaryFolder:
    """This is a folder (mode 0700) that belongs to this process until it ends."""

    path: Path
    handle: int
    """A file descriptor of the folder, which holds its lock. The kernel closes it with the process, however that
    ends."""

    def remove(self) -> None:
        """Delete the folder; idempotent."""
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self.handle)


def make_temporary() -> TemporaryFolder:
    """Make a folder of this process. Raises OSError."""
    for _ in range(_ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=prefix()))
        handle = _locked(path)
        if handle is not None and _is(path, handle):
            return TemporaryFolder(path, handle)
        if handle is not None:  # another process took it for a leftover, before it was locked
            os.close(handle)
    raise OSError(f"no temporary folder could be made in {tempfile.gettempdir()}: other processes keep deleting them")


def remove_leftovers() -> None:
    """Remove the folders of launchers that were killed before they could do it.

    A process number does not say whether a launcher runs: it may be one of another container or machine that shares the
    temporary folder. So the name of a folder has the boot id of its machine, and a lock (flock) its owner. The kernel
    of that machine knows the lock, whichever container the owner is in; folders of other machines and of earlier boots
    stay.
    """
    if not boot_id():
        return
    for path in Path(tempfile.gettempdir()).glob(f"{prefix()}*"):
        handle = _locked(path)
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


def prefix() -> str:
    """Return how the names of this machine's folders begin. They are short, because sockets in them have long names."""
    return f"fiberpo-engine-{boot_id().replace('-', '')[:12]}-"


def _locked(path: Path) -> int | None:
    """Return a descriptor with the folder's lock, or None if another process has it, or another user the folder."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _is(path: Path, handle: int) -> bool:
    """Return whether the folder still has its name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
