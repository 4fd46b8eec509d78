"""This script runs a program against inputs, one after the other, inside a sandbox that `sandbox.py` has made.

It is started as `python -s code_runner.py` and imports nothing of this package. The first line of its stdin is the job
(a JSON object: program, bounds), every further line an input; it answers with one JSON line each. Right answers never
come here: whatever a program does to this process, it can only change its own outputs.

Every input gets a forked process, so that the interpreter and the usual modules are loaded once for a program. When
that process has ended or exceeded a bound, all processes that it left are killed. As process 1 of a PID namespace this
script cannot be killed from inside; elsewhere it adopts orphans as a subreaper.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file, whose names must not stand before those of the standard library

import atexit
import ctypes
import json
import os
import random
import resource
import selectors
import signal
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

TICK_S = 0.02
"""How often processes, memory and files are counted while a program runs."""
STDERR_BYTES = 4096
"""How much of the end of stderr is reported."""
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PROGRAM = os.path.abspath("program.py")
"""Where the program stands; this script is started in its folder."""
RECURSION_LIMIT = 50_000
Job = dict[str, Any]
"""A JSON object of the protocol."""
STAR_IMPORTS = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "json", "builtins", "typing"),
)
"""Modules whose names a program finds defined, as the graders of LiveCodeBench and APPS define them."""
MODULES = (*STAR_IMPORTS, "sys", "os", "time", "array", "cmath", "decimal", "fractions")


def prctl(option: int, value: int) -> None:
    """Set one property of this process."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def usual_names() -> dict[str, Any]:
    """Return the names that a program finds defined."""
    names: dict[str, Any] = {}
    for module in STAR_IMPORTS:
        loaded = import_module(module)
        public = getattr(loaded, "__all__", None) or [name for name in dir(loaded) if not name.startswith("_")]
        names.update((name, getattr(loaded, name)) for name in public)
    names.update((module, import_module(module)) for module in MODULES)
    return names


# ---- in the process of one input ----


def run_program(job: Job, names: dict[str, Any], given: Job) -> None:
    """Run the program as a script, or call its function with the given arguments and write the result as JSON."""
    called = job["fn_name"]
    module = load_program("__main__" if called is None else "program", names)
    if called is None:
        return
    if hasattr(getattr(module, "Solution", None), called):
        function = getattr(module.Solution(), called)
    else:
        function = getattr(module, called, None)
    if function is None or function is names.get(called):  # `add` is a usual name: that of the module operator
        raise NameError(f"the program defines no function {called!r}")
    value = json.dumps(function(*given["arguments"]))
    with open(3, "w", encoding="ascii") as file:
        file.write(value)


def load_program(name: str, names: dict[str, Any]) -> Any:
    """Import the program's file under a name."""
    spec = spec_from_file_location(name, PROGRAM)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    vars(module).update({key: value for key, value in names.items() if key not in vars(module)})
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def child(job: Job, names: dict[str, Any], given: Job, descriptors: list[int]) -> None:
    """Bound this process, run the program in it, and end it. Nothing is returned."""
    code = 1
    try:
        os.setsid()
        for target, source in enumerate(descriptors):
            os.dup2(source, target)
        os.closerange(len(descriptors), 256)
        bound(job)
        for number in (signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)
        options: Any = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
        sys.stdin = sys.__stdin__ = open(0, **options)  # type: ignore[misc]  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", **options)  # type: ignore[misc]  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, **options)  # type: ignore[misc]  # noqa: SIM115
        sys.argv = [PROGRAM]
        sys.dont_write_bytecode = True
        sys.setrecursionlimit(RECURSION_LIMIT)
        random.seed(0)  # a program that does not seed its random numbers gets the same reward again
        code = exit_code(job, names, given)
        sys.stdout.flush()
        sys.__stdout__.flush()
    except BaseException:
        with suppress(BaseException):  # if stderr is gone too, the exit code remains
            traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(job: Job, names: dict[str, Any], given: Job) -> int:
    """Run the program to its end, with its threads and exit functions, and return the exit code of a script."""
    code = 0
    try:
        run_program(job, names, given)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    return code & 255


def bound(job: Job) -> None:
    """Give this process its limits, and another user's rights where the runner has root's."""
    os.nice(10)  # the runner must get the processor when a program has started many processes
    bounds = job["bounds"]
    limits = {
        resource.RLIMIT_CPU: bounds["cpu_s"],
        resource.RLIMIT_AS: bounds["memory_bytes"],
        resource.RLIMIT_STACK: bounds["memory_bytes"],
        resource.RLIMIT_FSIZE: bounds["folder_bytes"],
        resource.RLIMIT_NOFILE: bounds["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if bounds["count_by_kernel"]:
        limits[resource.RLIMIT_NPROC] = bounds["processes"]
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        more = int(limit == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY)
        resource.setrlimit(limit, (value, value + more))  # SIGXCPU comes at the soft limit, SIGKILL a second later
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where the program can kill the runner, it ends itself
    prctl(PR_SET_DUMPABLE, 1)  # its own /proc/self/fd must be readable: /dev/stdin leads through it


# ---- in the runner ----


def excess(bounds: Job, began: float) -> str | None:
    """Return which bound the processes of an input exceed, or None. `began`: when they were started (monotonic s)."""
    if time.monotonic() - began > bounds["wall_s"]:
        return "timeout"
    tasks, resident = 0, 0
    for pid in family():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        tasks += int(fields[17])
        resident += int(fields[21]) * PAGE_BYTES
    if tasks > bounds["processes"]:
        return "processes"
    if resident > bounds["memory_bytes"]:
        return "memory"
    if bounds["files"]:
        room = os.statvfs(".")
        if room.f_files - room.f_ffree > bounds["files"]:
            return "files"
    return None


def family() -> list[int]:
    """Return the numbers of all processes below this one."""
    if os.getpid() == 1:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    found, waiting = [], [os.getpid()]
    while waiting:
        pid = waiting.pop()
        with suppress(OSError):  # it has ended meanwhile
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    waiting += map(int, file.read().split())
        found.append(pid)
    return found[1:]


def kill_all() -> int:
    """Kill and reap every process below this one, and return how many there were."""
    killed = 0
    while True:
        with suppress(ProcessLookupError, PermissionError):
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)  # the kernel lets no process fork while it does this
            else:
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    for pid in family():
                        os.kill(pid, number)
        try:
            while os.waitpid(-1, 0 if os.getpid() == 1 else os.WNOHANG)[0]:
                killed += 1
        except ChildProcessError:
            return killed
        time.sleep(0.001)


def run_input(job: Job, names: dict[str, Any], given: Job) -> Job:
    """Run the program once and return what came out."""
    pipes = [os.pipe() for _ in range(2 if job["fn_name"] is None else 3)]
    with tempfile.TemporaryFile(dir=".") as stdin:
        stdin.write(given.get("stdin", "").encode("utf-8", "surrogateescape"))
        stdin.seek(0)
        pid = os.fork()
        if pid == 0:
            child(job, names, given, [stdin.fileno(), *(writer for _, writer in pipes)])
    for _, writer in pipes:
        os.close(writer)
    try:
        return watch(job, pid, [reader for reader, _ in pipes])
    finally:
        for reader, _ in pipes:
            os.close(reader)


def watch(job: Job, pid: int, readers: list[int]) -> Job:
    """Read what a process writes until it ends or exceeds a bound; then kill what is left of it."""
    bounds, began = job["bounds"], time.monotonic()
    texts = [bytearray() for _ in readers]
    status: str | None = None
    code: int | None = None
    looked = began
    with selectors.DefaultSelector() as selector:
        for number, reader in enumerate(readers):
            selector.register(reader, selectors.EVENT_READ, number)
        wake_up(selector, pid)
        while status is None and code is None:
            take(selector, texts, TICK_S)
            if any(len(text) > bounds["output_bytes"] for text in texts):
                status = "output"
            code = reap(pid)
            if code is None and time.monotonic() - looked > TICK_S:
                status = excess(bounds, began) or status
                looked = time.monotonic()
        seconds = time.monotonic() - began
        left = kill_all() - (code is None)
        while status is None and take(selector, texts, 0):  # no process is left that could write more
            if any(len(text) > bounds["output_bytes"] for text in texts):
                status = "output"
    if status is None:
        late = code == -signal.SIGXCPU or (code == -signal.SIGKILL and seconds >= bounds["cpu_s"])
        status = "timeout" if late else "ok" if code == 0 else "error"
    found: Job = {"status": status, "code": code, "seconds": seconds, "left": left}
    found["stdout"] = texts[0][: bounds["output_bytes"]].decode("utf-8", "replace")
    found["stderr"] = texts[1].decode("utf-8", "replace")
    if len(texts) > 2 and status == "ok":
        found["value"] = texts[2].decode("ascii", "replace")
    return found


def wake_up(selector: selectors.BaseSelector, pid: int) -> None:
    """Have the selector return as soon as a process ends, where the kernel can do that (Linux 5.3)."""
    with suppress(OSError, AttributeError):  # without it the end is noticed at the next tick
        selector.register(os.pidfd_open(pid), selectors.EVENT_READ, None)


def take(selector: selectors.BaseSelector, texts: list[bytearray], timeout: float) -> bool:
    """Read once from every pipe that holds something, and return whether any did."""
    found = False
    for key, _ in selector.select(timeout):
        if key.data is None:
            selector.unregister(key.fd)
            os.close(key.fd)
            continue
        part = os.read(key.fd, 1 << 16)
        if not part:
            selector.unregister(key.fd)
            continue
        found = True
        texts[key.data] += part
        if key.data == 1:
            del texts[1][:-STDERR_BYTES]
    return found


def reap(pid: int) -> int | None:
    """Reap all processes that have ended, and return the exit code of `pid` if it is one of them."""
    code = None
    try:
        while True:
            ended, wait_status = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                return code
            if ended == pid:
                code = os.waitstatus_to_exitcode(wait_status)
    except ChildProcessError:
        return code


def answer(fields: Job) -> None:
    """Write one line to whoever started this script."""
    rest = (json.dumps(fields) + "\n").encode("ascii")
    while rest:
        rest = rest[os.write(1, rest) :]


def main() -> None:
    """Read the job, then answer every input."""
    lines = sys.stdin.buffer
    job = json.loads(lines.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    prctl(PR_SET_DUMPABLE, 0)  # no program may read this process's memory or open its files
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with open(PROGRAM, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(job["program"])
    os.chmod(PROGRAM, 0o644)
    names = usual_names() if job["usual_names"] else {}
    answer({"status": "ready"})
    for line in iter(lines.readline, b""):
        try:
            result = run_input(job, names, json.loads(line))
        except OSError as error:  # an earlier input has left no room in the folder
            result = {"status": "files", "code": None, "seconds": 0.0, "left": 0, "stdout": "", "stderr": str(error)}
        answer(result)
        if job["stop_after_failure"] and result["status"] != "ok":
            break


if __name__ == "__main__":
    main()
