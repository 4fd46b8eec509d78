"""This script makes a sandbox out of the kernel's own means and becomes the runner inside it.

It is started as `python -s sandbox_launcher.py SETTINGS` (a JSON object that `sandbox.py` writes), imports nothing of
this package, and does what bubblewrap does, for machines that do not have it. With `"namespaces": true` it makes new
user, PID, network, mount, IPC and UTS namespaces with a file system of its own: the interpreter and the system's
libraries read-only, an empty folder in memory, and nothing else. As root it makes no user namespace; the runner gives
the program another user's rights instead. Otherwise it only closes what the seccomp filter closes.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file, whose names must not stand before those of the standard library

import base64
import ctypes
import json
import os
import signal
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
DEVICES = ("null", "zero", "full", "random", "urandom")

LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError with its name."""
    converted = [os.fsencode(value) if isinstance(value, str) else value for value in arguments]
    if getattr(LIBC, name)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Call mount(2)."""
    call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def bind_read_only(source: str, target: str) -> None:
    """Make a file or folder with all that is mounted below it appear at `target`, where nothing can change it."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)  # struct mount_attr
    number, folder, flags, size = map(ctypes.c_long, (MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ctypes.sizeof(attributes)))
    call("syscall", number, folder, target, flags, ctypes.byref(attributes), size)


def enter_namespaces(as_root: bool) -> None:
    """Leave the namespaces of the machine; the PID namespace begins with the next child."""
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP
    uid, gid = os.getuid(), os.getgid()
    call("unshare", flags | (0 if as_root else CLONE_NEWUSER))
    if not as_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def make_root(settings: dict[str, Any]) -> None:
    """Make a file system that holds only what the settings name, and make it the root."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.mkdir("/tmp/old")
    call("pivot_root", "/tmp", "/tmp/old")
    os.chdir("/")
    for path, target in settings["links"]:
        os.symlink(target, path)
    for path in settings["read_only"]:
        bind_read_only(f"/old{path}", path)
    os.mkdir("/dev")
    for name in DEVICES:
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY))
        mount(f"/old/dev/{name}", f"/dev/{name}", None, MS_BIND)
    for path, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"/dev/{path}")
    os.mkdir("/proc")
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(settings["folder"])
    room = f"mode=1777,size={settings['folder_bytes']},nr_inodes={settings['files']}"
    mount("tmpfs", settings["folder"], "tmpfs", MS_NOSUID | MS_NODEV, room)
    call("umount2", "/old", MNT_DETACH)
    os.rmdir("/old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(settings["folder"])


def install_filter(program: bytes) -> None:
    """Have the kernel refuse the system calls of the filter in this process and all that it starts."""

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    described = Program(len(program) // 8, program)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(settings: dict[str, Any]) -> None:
    """Make the sandbox and run the runner in it."""
    die_with_parent()
    if settings["namespaces"]:
        enter_namespaces(settings["as_root"])
        pid = os.fork()
        if pid:
            os.closerange(0, 2)  # the pipes belong to the runner: their end is its end
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
        die_with_parent()
        os.setsid()
        make_root(settings)
    install_filter(base64.b64decode(settings["filter"]))
    os.closerange(3, 256)
    os.execve(settings["command"][0], settings["command"], settings["variables"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
