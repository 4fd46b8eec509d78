"""This module runs the program of an agent for one trajectory and reads what it reports."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPERVISOR = Path(__file__).parents[1] / "supervisor.py"
KEPT_BYTES = 64 << 10
"""How much of the end of an agent's output is kept."""
SHOWN_CHARACTERS = 1000
"""How much of the end of an agent's error output a message shows."""
READ_BYTES = 1 << 16
END_S = 10.0
"""How long a killed agent may take to disappear before that is a failure of its own."""


class AgentFailed(RuntimeError):
    """An agent ended with an error, did nothing, or did too much; the message says which agent and what it printed."""


@dataclass(frozen=True)
class AgentReport:
    """Holds what a program said about its trajectory, in the last line of its output that is a JSON object."""

    fields: Mapping[str, Any] | None
    """The object; None when no line is one."""
    output: str
    """The end of its output."""


class _Tail:
    """Keeps the end of a stream that is read to its end."""

    def __init__(self) -> None:
        self.data = b""

    async def read(self, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(READ_BYTES):
            self.data = (self.data + data)[-KEPT_BYTES:]

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace").strip()


async def run_agent(command: Sequence[str], environment: Mapping[str, str], task: Mapping[str, Any]) -> AgentReport:
    """Run a program to its end and return its report. What it started ends with it, also when this is cancelled.

    command: the program and its arguments. environment: variables besides those of this process. task: written to the
    program's standard input as one line of JSON. It runs in the current folder, with a folder for temporary files of
    its own.

    Raises AgentFailed for a program that cannot be started, and for an exit code other than 0.
    """
    folder = tempfile.mkdtemp(prefix="agent-")
    theirs, ours = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-IS", str(SUPERVISOR), str(theirs), *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(theirs,),
            start_new_session=True,
            env={**os.environ, **environment, "TMPDIR": folder},
        )
    except OSError as error:
        os.close(ours)
        shutil.rmtree(folder, ignore_errors=True)
        raise AgentFailed(f"the agent {command[0]!r} could not be started: {error.strerror}") from error
    finally:
        os.close(theirs)
    output, errors = _Tail(), _Tail()
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    reading = asyncio.gather(output.read(process.stdout), errors.read(process.stderr))
    try:
        await _write(process.stdin, json.dumps(task) + "\n")
        code = await process.wait()
    finally:
        os.close(ours)  # the supervisor then kills what is left, and ends
        await _ended(process, reading, command)
        shutil.rmtree(folder, ignore_errors=True)
    if code:
        raise AgentFailed(
            f"the agent {command[0]!r} ended with exit code {code}; its last errors:\n{shown(errors.text)}"
        )
    return AgentReport(last_object(output.text), output.text)


async def _write(stream: asyncio.StreamWriter, text: str) -> None:
    try:
        stream.write(text.encode())
        await stream.drain()
        stream.close()
    except ConnectionError:  # a program need not read its input
        pass


async def _ended(process: asyncio.subprocess.Process, reading: asyncio.Future[Any], command: Sequence[str]) -> None:
    """Wait until a process, which was asked to end, is gone and its output is read."""
    done, _ = await asyncio.wait({asyncio.ensure_future(process.wait()), reading}, timeout=END_S)
    if len(done) < 2:
        reading.cancel()
        raise AgentFailed(f"the agent {command[0]!r} was killed, but did not end within {END_S:g} s")


def last_object(output: str) -> Mapping[str, Any] | None:
    """Return the last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.lstrip().startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
    return None


def shown(text: str) -> str:
    """Return the end of an output for a message."""
    return text[-SHOWN_CHARACTERS:] or "(nothing)"
