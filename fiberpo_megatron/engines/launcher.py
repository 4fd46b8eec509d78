"""A server process runs this first: it asks the kernel to end it with its parent, then becomes the server (exec).

Run it as `python launcher.py PARENT_PID COMMAND..`; it must not import this package.

The kernel sends SIGKILL when the *thread* that started this process ends, so engines are started from a thread that
lives as long as they should (the main one). SGLang's own children ask to be ended with the server in the same way.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which starts this server, is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
