"""This module names a process so that another one, perhaps on another machine, can find out whether it still runs.

A process id alone does not do that: it is used again after the process has ended, containers (PID namespaces) have
numbers of their own, and so have other machines. It needs the standard library only.
"""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_INITIAL_NAMESPACE = "pid:[4026531836]"
"""The PID namespace of a machine itself; Linux gives it this number on every machine."""
_DEAD = {"Z", "X"}
"""States of /proc/<pid>/stat in which a process has ended, though its parent has not taken note of it yet."""


@dataclass(frozen=True)
class ProcessIdentity:
    """Names one process of one boot of one machine."""

    host: str
    boot: str
    """The kernel's random id of this boot; the containers of a machine share it. Empty if there is none (not Linux)."""
    namespace: str
    """The PID namespace in which `pid` is a number."""
    pid: int
    started: int
    """When the process started, in clock ticks since the boot; 0 if that is unknown."""

    @property
    def contained(self) -> bool:
        """Return whether `pid` is a number inside of a container, which names another process outside."""
        return self.namespace not in ("", _INITIAL_NAMESPACE)

    def runs(self) -> bool | None:
        """Return whether the process still runs, or None if that cannot be seen from this process."""
        here = this_process()
        if not self.boot or (self.host, self.boot, self.namespace) != (here.host, here.boot, here.namespace):
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass  # it exists, and belongs to another user
        state, started = _stat(self.pid)
        if state in _DEAD or (started and self.started and started != self.started):
            return False  # the number belongs to another process by now
        return True if started and self.started else None  # /proc may hide the processes of other users


def this_process() -> ProcessIdentity:
    """Return the identity of the calling process."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return ProcessIdentity(platform.node(), boot_id(), namespace, os.getpid(), _stat(os.getpid())[1])


def boot_id() -> str:
    """Return the kernel's random id of this boot, which no other machine and no other boot has; empty if there is
    none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _stat(pid: int) -> tuple[str, int]:
    """Return the state of a process and its start in clock ticks since the boot; ("", 0) if they cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0
