"""This module runs programs that a model wrote in a sandbox on this machine.

    sandbox = Sandbox("auto", Bounds(wall_s=4.0))
    print(sandbox.description)                     # which means it uses, and what it bounds
    run = await sandbox.run("print(input())", stdin="hello")
    assert run.status == "ok" and run.stdout == "hello\\n"
    async with sandbox.program(text) as program:   # several inputs share one start of the interpreter
        runs = [await program.run(stdin=text) for text in inputs]

A sandbox is bubblewrap's (`bwrap`), or one that sandbox_launcher.py makes with the same namespaces, or (by name alone)
limits of resources without namespaces. All of them run code_runner.py inside and a seccomp filter around it. This
module imports the standard library alone and runs on Python 3.10.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fiberpo_megatron.environments.builtin.sandbox_bounds import ENDED, FILES, Bounds, ProgramRun
from fiberpo_megatron.environments.builtin.sandbox_system import (
    START_S,
    SYSTEM,
    SandboxError,
    filter_file,
    interpreter_folders,
    kernel_version,
    links,
    present,
    temporary_folder,
    unused_user,
)
from fiberpo_megatron.environments.builtin.system_calls import seccomp_filter
from fiberpo_megatron.printable import printable

RUNNER = Path(__file__).with_name("code_runner.py")
LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
FOLDER = "/box"
"""The folder of a program, in memory."""
GRACE_S = 5.0
"""How much longer than its bounds say a runner is waited for."""
BUBBLEWRAP = (0, 7)
"""The first version that can bound a folder in memory (`--size`)."""
COUNTS_BY_NAMESPACE = (5, 14)
"""The first kernel that counts the processes of a user namespace apart from those of the same user elsewhere."""

Kind = Literal["bubblewrap", "namespaces", "rlimits"]


@dataclass
class Program:
    """Runs one program against inputs, one after the other. `Sandbox.program` makes it."""

    process: asyncio.subprocess.Process
    bounds: Bounds
    _spent_s: float = field(default=0.0, init=False)
    _ended: str | None = field(default=None, init=False)

    async def run(self, *, stdin: str = "", arguments: Sequence[Any] | None = None) -> ProgramRun:
        """Run the program once, with a text on its stdin or with the arguments of its function."""
        if self._ended is None and self._spent_s >= self.bounds.program_s:
            self._ended = f"the program took longer than program_s = {self.bounds.program_s:g} s"
        if self._ended is not None:
            return ProgramRun(ENDED, stderr=self._ended)
        given = {"stdin": stdin} if arguments is None else {"arguments": list(arguments)}
        left_s = min(self.bounds.wall_s, self.bounds.program_s - self._spent_s)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            found = await asyncio.wait_for(self._ask(given), left_s + GRACE_S)
        except asyncio.TimeoutError:  # noqa: UP041 (another class before Python 3.11)
            self._ended = f"its sandbox did not answer within {left_s + GRACE_S:.1f} s"
            return ProgramRun("timeout", stderr=self._ended, seconds=loop.time() - began)
        self._spent_s += loop.time() - began
        if found is None:
            self._ended = "it ended its sandbox"
            return ProgramRun(ENDED, stderr=self._ended)
        return ProgramRun(**found)

    async def _ask(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Send an input and return the fields of its ProgramRun; None when the runner is gone or writes nonsense."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json_bytes(given))
            await self.process.stdin.drain()
            return await read_answer(self.process)
        except (ConnectionError, ValueError):  # ValueError: a line that is too long, or no JSON
            return None


class Sandbox:
    """Makes sandboxes of one kind with the same bounds.

    kind: bubblewrap, namespaces, rlimits, or auto, which takes the first of bubblewrap and namespaces that works here.
    python: the interpreter of the programs. Its folders are what they can import from.

    Raises SandboxError, with what was tried and what to do, when no sandbox of that kind works on this machine.
    """

    def __init__(self, kind: str = "auto", bounds: Bounds | None = None, python: str = sys.executable) -> None:
        self.bounds = bounds or Bounds()
        self.python = python
        self._as_root = os.geteuid() == 0
        self._folders = interpreter_folders(python)
        self.kind: Kind = self._choose(kind)

    @property
    def description(self) -> str:
        """Return one sentence that says which means are used and what they leave open."""
        bounds = self.bounds
        limits = (
            f"{bounds.wall_s:g} s and {bounds.memory_mib} MiB for each input, {bounds.program_s:g} s for each program"
        )
        if self.kind == "rlimits":
            return (
                f"programs run with limits of resources alone ({limits}): they can read what this user can read, and "
                "write where this user can write"
            )
        means = "bubblewrap" if self.kind == "bubblewrap" else "namespaces of the kernel"
        return f"programs run in a sandbox of {means} ({limits}, no network, a folder of their own)"

    async def run(self, program: str, *, stdin: str = "") -> ProgramRun:
        """Run a program once with a text on its stdin, in a sandbox of its own. Raises SandboxError."""
        async with self.program(program) as started:
            return await started.run(stdin=stdin)

    async def runs(
        self,
        text: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        fn_name: str | None = None,
        usual_names: bool = False,
        stop_after_failure: bool = False,
    ) -> AsyncGenerator[ProgramRun, None]:
        """Yield what a program did with each input, in their order; close the generator (`aclosing`) to stop before.

        inputs: {"stdin": text}, or {"arguments": list} with `fn_name`. stop_after_failure: yield nothing after the
        first run whose status is not ok. The other arguments are those of `program`.
        """
        async with self.program(text, fn_name=fn_name, usual_names=usual_names) as started:
            for given in inputs:
                run = await started.run(**given)
                yield run
                if stop_after_failure and run.status != "ok":
                    return

    @asynccontextmanager
    async def program(
        self, text: str, *, fn_name: str | None = None, usual_names: bool = False
    ) -> AsyncIterator[Program]:
        """Start a sandbox for a program, which ends with the `async with` block.

        fn_name: a function of the program (or a method of its class `Solution`) that is called with the arguments of
        each input. None: the program is a script that reads stdin.
        usual_names: have the names of the usual modules defined, as graders of programming tasks do.

        Raises SandboxError when the sandbox does not start.
        """
        with temporary_folder() if self.kind == "rlimits" else nullcontext() as folder:
            with filter_file() as filter_descriptor:
                process = await asyncio.create_subprocess_exec(
                    *self._command(filter_descriptor),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(filter_descriptor,),
                    limit=self._line_bytes(),
                    cwd=folder,
                    env=VARIABLES,
                )
            try:
                await self._send_job(process, self._job(text, fn_name, usual_names))
                yield Program(process, self.bounds)
            finally:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                process._transport.close()  # type: ignore[attr-defined]  # its pipes; asyncio has no public way

    async def _send_job(self, process: asyncio.subprocess.Process, job: Mapping[str, Any]) -> None:
        assert process.stdin is not None and process.stderr is not None
        try:
            process.stdin.write(json_bytes(job))
            ready = await asyncio.wait_for(read_answer(process), START_S)
        except (ConnectionError, ValueError):
            ready = None
        except asyncio.TimeoutError:  # noqa: UP041 (another class before Python 3.11)
            raise SandboxError(f"the sandbox ({self.kind}) was not ready in {START_S:g} s") from None
        if ready is None:
            said = printable((await process.stderr.read(2000)).decode(errors="replace").strip())
            raise SandboxError(f"the sandbox ({self.kind}) did not start: {said or 'it said nothing'}")

    # ---- what is started ----

    def _job(self, text: str, fn_name: str | None, usual_names: bool) -> dict[str, Any]:
        in_namespaces = self.kind != "rlimits"
        counts = self._as_root or kernel_version() >= COUNTS_BY_NAMESPACE
        return {
            "program": text,
            "fn_name": fn_name,
            "usual_names": usual_names,
            "stop_after_failure": False,
            "uid": unused_user() if self._as_root else None,
            "bounds": self.bounds.for_runner(count_by_kernel=in_namespaces and counts, count_files=in_namespaces),
        }

    def _line_bytes(self) -> int:
        """Return how long an answer can be: a character of output may be written as \\u1234."""
        return 2 * 6 * (self.bounds.output_kib << 10) + (1 << 20)

    def _command(self, filter_descriptor: int, kind: str | None = None) -> list[str]:
        kind = kind or self.kind
        if kind == "bubblewrap":
            return self._bubblewrap(filter_descriptor)
        settings = {
            "namespaces": kind == "namespaces",
            "as_root": self._as_root,
            "read_only": self._shown(),
            "links": self._links(),
            "folder": FOLDER,
            "folder_bytes": self.bounds.folder_mib << 20,
            "files": 2 * FILES,
            "filter": base64.b64encode(seccomp_filter()).decode(),
            "command": [self.python, "-s", str(RUNNER)],
            "variables": VARIABLES,
        }
        return [sys.executable, "-s", str(LAUNCHER), json.dumps(settings)]

    def _bubblewrap(self, filter_descriptor: int) -> list[str]:
        command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        command += [] if self._as_root else ["--unshare-user"]
        command += ["--die-with-parent", "--new-session", "--as-pid-1", "--seccomp", str(filter_descriptor)]
        for path, target in self._links():
            command += ["--symlink", target, path]
        for folder in sorted({str(parent) for path in self._shown() for parent in Path(path).parents} - {"/"}):
            command += ["--perms", "0755", "--dir", folder]  # else only root may look for what is below
        for path in self._shown():
            command += ["--ro-bind", path, path]
        command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        command += ["--perms", "1777", "--size", str(self.bounds.folder_mib << 20), "--tmpfs", FOLDER]
        command += ["--remount-ro", "/", "--chdir", FOLDER]
        return [*command, "--", self.python, "-s", str(RUNNER)]

    def _shown(self) -> list[str]:
        """Return the files and folders that a program can read."""
        return [*present(SYSTEM), *self._folders, str(RUNNER)]

    def _links(self) -> list[tuple[str, str]]:
        """Return (path, target) of the symbolic links at the root; /tmp is the program's folder where it can be."""
        taken = any(path.startswith("/tmp/") for path in self._shown())
        return [*links(SYSTEM), *([] if taken else [("/tmp", FOLDER)])]

    # ---- the choice ----

    def _choose(self, wanted: str) -> Kind:
        if wanted not in ("auto", "bubblewrap", "namespaces", "rlimits"):
            raise SandboxError(
                f'sandbox = {wanted!r} is unknown; use "auto", "bubblewrap", "namespaces", "rlimits" or "remote"'
            )
        kinds: tuple[Kind, ...] = ("bubblewrap", "namespaces") if wanted == "auto" else (wanted,)  # type: ignore[assignment]
        reasons = []
        for kind in kinds:
            reason = self.why_not(kind)
            if reason is None:
                return kind
            reasons.append(f"{kind}: {reason}")
        raise SandboxError(
            f"no sandbox works on this machine ({'; '.join(reasons)}); install bubblewrap (apt-get install "
            'bubblewrap), allow user namespaces, or name a sandbox service with sandbox = "remote" and its address; '
            'sandbox = "rlimits" bounds time and memory alone and must be chosen by name'
        )

    def why_not(self, kind: Kind) -> str | None:
        """Try a sandbox of a kind with a small program, and return why it does not work here, or None."""
        if not sys.platform.startswith("linux"):
            return f"it needs Linux, this is {sys.platform}"
        if kind == "bubblewrap":
            if shutil.which("bwrap") is None:
                return "there is no bwrap"
            said = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=START_S).stdout
            version = tuple(map(int, re.findall(r"\d+", said)[:2]))
            if version < BUBBLEWRAP:
                return f"{said.strip()} is older than 0.7"
        if kind == "rlimits" and self._as_root:
            return "this process is root, and so would the programs be; run it as another user"
        try:
            return self._try(kind)
        except (OSError, ValueError) as error:
            return str(error)

    def _try(self, kind: Kind) -> str | None:
        self.kind = kind
        lines = json_bytes(self._job("print(input())", None, False)) + json_bytes({"stdin": "works"})
        with filter_file() as filter_descriptor, temporary_folder() as folder:
            try:
                done = subprocess.run(
                    self._command(filter_descriptor, kind),
                    input=lines,
                    capture_output=True,
                    pass_fds=(filter_descriptor,),
                    cwd=folder,
                    env=VARIABLES,
                    timeout=START_S,
                )
            except subprocess.TimeoutExpired:
                return f"it did not answer in {START_S:g} s"
        answers = done.stdout.decode(errors="replace").splitlines()
        if len(answers) == 2 and json.loads(answers[1])["stdout"] == "works\n":
            return None
        said = answers[1] if len(answers) == 2 else done.stderr.decode(errors="replace").strip()[-500:]
        return printable(said) or f"it ended with exit code {done.returncode}"


VARIABLES = {
    "PATH": "/usr/bin:/bin",
    "HOME": FOLDER,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set of strings must not change a reward
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All environment variables of a program."""


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return one line of JSON in ASCII, so that halves of characters survive."""
    return json.dumps(value).encode("ascii") + b"\n"


async def read_answer(process: asyncio.subprocess.Process) -> dict[str, Any] | None:
    """Return the next line of a runner; None at the end. Raises ValueError for what is no answer."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        return None
    found = json.loads(line)
    if not isinstance(found, dict) or not isinstance(found.get("status"), str):
        raise ValueError("a runner's answer is no object with a status")
    return found
