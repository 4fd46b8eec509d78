"""This module holds a worker process as the trainer sees it: pipes, shared page, output, memory and end."""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from fiberpo_megatron.environments import wire
from fiberpo_megatron.environments.results import FailureKind
from fiberpo_megatron.plugins import PluginError
from fiberpo_megatron.printable import printable
from fiberpo_megatron.subprocesses import exit_text, without_launcher

BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
PIPE_BYTES = 1 << 20
LOG_BYTES = 1 << 20
"""How much of what a worker and its successors print is kept."""
LAST_BYTES = 2000
"""How much of what a worker printed last is quoted when it dies."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class FrameRefused(Exception):
    """A worker announced a frame that must not be read."""

    def __init__(self, job: int, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.job = job
        self.kind = kind


class WorkerLog:
    """Keeps the first part of what the processes of one worker print in a file, and drops the rest.

    A disk that does not take it does not end the run: what is printed is dropped after one warning on stderr.

    path: None keeps no file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._left = LOG_BYTES

    def write(self, data: bytes) -> None:
        """Append to the file while there is room."""
        if self._path is None or self._left <= 0 or not data:
            return
        self._left -= len(data)
        try:
            with self._path.open("ab") as file:
                file.write(data[: self._left + len(data)])
                if self._left <= 0:
                    file.write(b"\n(what was printed after this is not kept)\n")
        except OSError as error:
            self._left = 0
            print(
                f"WARNING: {self._path} cannot be written ({error.strerror}): what the worker prints from now on is "
                "not kept. Make room, or make the folder writable",
                file=sys.stderr,
                flush=True,
            )


class WorkerProcess:
    """Holds a running worker process.

    Make it on the event loop that it is used on. The thread of that loop must live as long as the worker should: the
    kernel kills a worker when the thread that started it ends.

    on_frame: called with (kind, job, payload) for every frame.
    check: called with (kind, job, length) for every header; it may raise FrameRefused.
    on_refused: called with what `check` raised; after that nothing more is read from the process.
    """

    def __init__(
        self,
        python: str,
        log: WorkerLog,
        on_frame: Callable[[int, int, bytes], None],
        check: Callable[[int, int, int], None],
        on_refused: Callable[[FrameRefused], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._on_frame = on_frame
        self._on_refused = on_refused
        self._reader = wire.FrameReader(check)
        self._out = bytearray()
        self._flushing = False
        self._last = b""
        self.closed = False
        """Whether the process has closed its end of a pipe, so that it is ending."""
        self.page = wire.Page.create()
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        self._output, output = os.pipe()
        try:
            self._process = subprocess.Popen(
                [python, "-u", str(BOOTSTRAP), *map(str, (os.getpid(), commands, replies, self.page.descriptor))],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(commands, replies, self.page.descriptor),
                env=worker_environment(os.environ, own_interpreter=python == sys.executable),
                start_new_session=True,
            )
        except OSError as error:
            for descriptor in (self._commands, self._replies, self._output):
                os.close(descriptor)
            self.page.close()
            raise PluginError(f"{python} could not be started: {error.strerror}; correct `python`") from error
        finally:
            for descriptor in (commands, replies, output):
                os.close(descriptor)
        for descriptor in (self._commands, self._replies, self._output):
            os.set_blocking(descriptor, False)
            with suppress(OSError, AttributeError):  # a bigger pipe only saves switches between the processes
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._loop.add_reader(self._replies, self._readable)

    @property
    def pid(self) -> int:
        """Return the number of the process, which is also that of its process group."""
        return self._process.pid

    # ---- frames ----

    def send(self, kind: wire.Kind, job: int, payload: bytes) -> None:
        """Queue a frame. The frames of one turn of the event loop are written together."""
        self._out += wire.frame(kind, job, payload)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._commands < 0:
            return
        try:
            written = os.write(self._commands, self._out)
            del self._out[:written]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # `exit_code` will say how it ended
            self.closed = True
            self._out.clear()
        if self._out:
            self._flushing = True
            self._loop.add_writer(self._commands, self._flush_when_writable)

    def _flush_when_writable(self) -> None:
        self._loop.remove_writer(self._commands)
        self._flush()

    def _readable(self) -> None:
        try:
            data = os.read(self._replies, wire.READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.closed = True
            self._loop.remove_reader(self._replies)
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        try:
            for kind, job, payload in self._reader.feed(data):
                self._on_frame(kind, job, payload)
        except FrameRefused as refused:
            self._loop.remove_reader(self._replies)
            self._reader = wire.FrameReader(_ignore)
            self._on_refused(refused)

    def read_rest(self) -> None:
        """Read the frames that an ended process has left in its pipe."""
        with suppress(BlockingIOError):
            while data := os.read(self._replies, wire.READ_BYTES):
                self._feed(data)

    # ---- what it prints ----

    def read_output(self) -> None:
        """Take what it has printed, at most a pipe's content at once: a flood costs the trainer no more than this."""
        with suppress(BlockingIOError):
            data = os.read(self._output, PIPE_BYTES)
            self._log.write(data)
            self._last = (self._last + data)[-LAST_BYTES:]

    def last_output(self) -> str:
        """Return the end of what it printed, safe to print."""
        return printable(self._last.decode("utf-8", "replace").strip(), keep="\n\t")

    # ---- its end ----

    def ask_where(self) -> None:
        """Have the process write where it stands into its page."""
        if self._process.returncode is None:  # a reaped process's number may belong to another one
            with suppress(ProcessLookupError):
                os.kill(self.pid, wire.TRACEBACK_SIGNAL)

    def kill(self) -> None:
        """Kill the process and its group: the processes that it has started, too."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def close_commands(self) -> None:
        """Ask the process to end: it ends when its command pipe does."""
        if self._commands >= 0:
            self._loop.remove_writer(self._commands)
            os.close(self._commands)
            self._commands = -1

    def exit_code(self) -> int | None:
        """Return how the process has ended, negative for a signal; None while it runs.

        Its group is killed before the process is reaped, while its number cannot belong to anyone else.
        """
        if self._process.returncode is None:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            self.kill()
            self._process.wait()
        return self._process.returncode

    def release(self) -> None:
        """Close all descriptors of an ended process."""
        self._loop.remove_reader(self._replies)
        self.close_commands()
        os.close(self._replies)
        os.close(self._output)
        self.page.close()

    def memory(self, bound: int) -> int:
        """Return the bytes that the process and its descendants use, exactly where that is above `bound`.

        The resident sizes count shared pages several times, so that only a sum below the bound is believed at once.
        """
        family = descendants(self.pid)
        resident = sum(map(resident_bytes, family))
        return resident if resident <= bound else sum(map(proportional_bytes, family))


def _ignore(kind: int, job: int, length: int) -> None:
    """Refuse every frame silently: the stream is lost."""
    raise FrameRefused(job, "output", "")


def worker_environment(parent: Mapping[str, str], *, own_interpreter: bool) -> dict[str, str]:
    """Return the environment of a worker: without GPUs, without the launcher's variables, with one thread for BLAS."""
    environment = without_launcher(parent)
    if not own_interpreter:  # these name the trainer's packages
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTHONHASHSEED", "0")  # the order of sets of strings must not differ between workers
    return environment


def interpreter(python: Path | None, name: str) -> str:
    """Return the interpreter of the workers of environment `name`. Raises PluginError for one that cannot be run."""
    if python is None:
        return sys.executable
    path = python.expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise PluginError(
            f"environment {name!r}: python = {str(python)!r} is not an executable file; name a Python of version 3.10 "
            "or newer, or leave it out"
        )
    return str(path.absolute())


def describe_exit(code: int) -> str:
    """Return how a worker ended, in words and with a hint at the likely cause."""
    hint = " (the kernel does that when the machine has no memory left)" if code == -signal.SIGKILL else ""
    return f"ended with {exit_text(code)}{hint}"


def descendants(pid: int) -> list[int]:
    """Return a process and all processes below it; an empty list where the system does not say."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        process = waiting.pop()
        with suppress(OSError):  # it has ended meanwhile
            for thread in os.listdir(f"/proc/{process}/task"):
                waiting += map(int, Path(f"/proc/{process}/task/{thread}/children").read_bytes().split())
        found.append(process)
    return found


def resident_bytes(pid: int) -> int:
    """Return the resident size of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * PAGE_BYTES
    except OSError:
        return 0


def proportional_bytes(pid: int) -> int:
    """Return the resident size of a process with a share of the pages that it shares; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


async def end_in_order(processes: Sequence[WorkerProcess], seconds: float) -> None:
    """Ask workers to end, and kill those that have not ended after `seconds`, with all that they started."""
    for process in processes:
        process.close_commands()
    deadline = monotonic() + seconds
    while monotonic() < deadline and None in {process.exit_code() for process in processes}:
        for process in processes:
            process.read_output()
        await asyncio.sleep(0.01)
    for process in processes:
        process.kill()
        while process.exit_code() is None:  # SIGKILL ends it soon, whatever it does
            await asyncio.sleep(0.01)
        process.read_output()
        process.release()
