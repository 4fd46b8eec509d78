"""This module says what a sandbox takes from this machine: folders of the system and of an interpreter, and its kernel.

It imports the standard library alone and runs on Python 3.10.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from fiberpo_megatron.environments.builtin.system_calls import seccomp_filter

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/localtime")
"""What a program sees of the system, read-only, besides the folders of its interpreter."""
START_S = 20.0
"""How long a sandbox may take to start; on a busy machine an interpreter takes seconds."""


class SandboxError(RuntimeError):
    """A sandbox could not be made or did not answer, whatever program it was to run."""


def present(paths: Sequence[str]) -> list[str]:
    """Return those paths that exist and are no symbolic links."""
    return [path for path in paths if os.path.exists(path) and not os.path.islink(path)]


def links(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return (path, target) of those that are symbolic links, as /lib is on many systems."""
    return [(path, os.readlink(path)) for path in paths if os.path.islink(path) and not path.startswith("/etc")]


def interpreter_folders(python: str) -> list[str]:
    """Return the folders outside the system's that an interpreter needs. Raises SandboxError if it cannot be asked."""
    asked = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.executable]))"
    try:
        done = subprocess.run([python, "-s", "-c", asked], capture_output=True, text=True, timeout=START_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the interpreter {python!r} of the programs cannot be run: {error}") from None
    prefix, base, executable = json.loads(done.stdout)
    found = []
    for folder in dict.fromkeys((base, os.path.realpath(base), prefix)):
        if folder in ("/", os.path.expanduser("~")):
            raise SandboxError(
                f"the interpreter {executable} has the prefix {folder}, which programs must not read; name another "
                "interpreter with `python`"
            )
        if folder != "/usr" and not folder.startswith("/usr/"):
            found.append(folder)
    return found


def kernel_version() -> tuple[int, int]:
    """Return the first two numbers of the kernel's version."""
    first, second = re.findall(r"\d+", platform.release())[:2]
    return int(first), int(second)


def unused_user() -> int:
    """Return the number of a user that most likely does not exist, so that its processes can be counted."""
    with open("/proc/self/uid_map") as file:
        ranges = [(int(first), int(first) + int(count)) for first, _, count in map(str.split, file)]
    for low, high in ((1 << 30, (1 << 31) - 1), (20_000, 60_000)):
        if any(first <= low and high <= end for first, end in ranges):
            return low + secrets.randbelow(high - low)
    return 65534


@contextmanager
def filter_file() -> Iterator[int]:
    """Yield a descriptor from which bubblewrap reads the seccomp filter."""
    descriptor = os.memfd_create("filter")
    try:
        os.write(descriptor, seccomp_filter())
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield a new folder, and remove it with whatever a program has made of it."""
    folder = tempfile.mkdtemp(prefix="fiberpo_program_")
    try:
        yield folder
    finally:
        with suppress(RecursionError):  # thousands of folders in one another
            shutil.rmtree(folder, ignore_errors=True)
        if os.path.exists(folder):
            for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
                subprocess.run([*command, "--", folder], stderr=subprocess.DEVNULL, timeout=START_S)
