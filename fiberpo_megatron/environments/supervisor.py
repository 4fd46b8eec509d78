"""This program runs another program and ends everything that was started there.

It is called as `python -IS supervisor.py PIPE PROGRAM ARGUMENT...`. PIPE is a descriptor whose other end the worker of
an environment holds. When the program ends, or when the pipe does because the worker closed it or died, all descendants
are killed, also those that have left the program's session: on Linux orphans become children of this process. The exit
code is that of the program, 128 + n for signal n.

It needs the standard library alone and imports nothing of this package.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

PR_SET_CHILD_SUBREAPER = 36
KILL_S = 5.0
"""How long descendants are looked for: processes that start others faster than they are killed do not end."""


def main() -> int:
    """Run the program of the command line and return the exit code for this process."""
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(command)  # descriptors beyond 2 stay here
    except OSError as error:
        print(f"{command[0]} could not be started: {error.strerror}", file=sys.stderr)
        return 127
    closed = threading.Event()
    threading.Thread(target=end_with, args=(pipe, closed), daemon=True).start()
    code = child.wait()
    kill_descendants()
    if closed.is_set():  # the other thread may have reaped the program, and `wait` would then say 0
        code = -signal.SIGKILL
    return code if code >= 0 else 128 - code


def end_with(pipe: int, closed: threading.Event) -> None:
    """Wait until the other end of a pipe is closed, say so, then kill all descendants and end this process."""
    while os.read(pipe, 1):
        pass
    closed.set()
    kill_descendants()
    os._exit(128 + signal.SIGKILL)


def kill_descendants() -> None:
    """Kill all processes below this one, and those that they start meanwhile."""
    deadline = time.monotonic() + KILL_S
    while time.monotonic() < deadline:
        found = descendants(os.getpid())
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if not found:
            return
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:  # zombies would be found for ever
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def descendants(process: int) -> "list[int]":
    """Return all processes below one; an empty list when the system does not say."""
    found = []
    waiting = [process]
    while waiting:
        parent = waiting.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    waiting += map(int, file.read().split())
        except OSError:  # it has ended meanwhile
            pass
        found.append(parent)
    return found[1:]


if __name__ == "__main__":
    sys.exit(main())
