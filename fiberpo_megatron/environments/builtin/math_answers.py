"""This module has the math-verify library compare answers, in a process of its own.

A comparison can take for ever inside one instruction (`9**9**9**9`), which nothing in the same process can interrupt.
This module imports the standard library alone and runs on Python 3.10: it is used in the workers of environments.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import IO, Any

WORKER = Path(__file__).with_name("math_worker.py")
LAST_CHARACTERS = 10_000
"""Only the end of a response is read: the final answer stands there, and parsing time grows with length."""


class MathVerifier:
    """Decides that a response is right when it equals the answer as text, or when math-verify finds them equal.

    math-verify takes the last boxed expression, else the last number or formula: "71 or 72" counts as 72. Ask
    for `\\boxed{}` in the prompt where that matters. A comparison over `timeout_s` seconds counts as wrong.
    Calls may come from any thread; they are answered one at a time (milliseconds each).
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        if find_spec("math_verify") is None:
            raise ValueError(
                "comparing mathematical answers needs the math-verify package; run `pip install math-verify`, or use "
                'mode = "last-number"'
            )
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._lock = Lock()

    def __call__(self, answer: str, response: str) -> bool:
        response = response[-LAST_CHARACTERS:]
        if response.strip() == answer.strip():
            return True
        if not response.strip():
            return False
        with self._lock:
            reply = self._ask({"answer": answer, "response": response})
        return reply is not None and bool(reply["correct"])

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._stop()

    def _ask(self, request: dict[str, str]) -> dict[str, Any] | None:
        """Return the process's answer, or None if its alarm ended it."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it has died since: reading says how
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return self._read(process)

    def _start(self) -> subprocess.Popen[str]:
        errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (_stop closes)
        self._errors = errors
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(self._timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        )
        if self._read(self._process) is None:
            raise RuntimeError("the math-verify process ran out of time while starting")
        return self._process

    def _read(self, process: subprocess.Popen[str]) -> dict[str, Any] | None:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        code, errors = self._stop()
        if code == -signal.SIGALRM:
            return None
        raise RuntimeError(f"the math-verify process ended with exit code {code}; its last output:\n{errors[-2000:]}")

    def _stop(self) -> tuple[int, str]:
        """End and reap the process; return its exit code and its stderr."""
        process, errors = self._process, self._errors
        self._process = self._errors = None
        if process is None or errors is None:
            return 0, ""
        assert process.stdin is not None and process.stdout is not None
        process.terminate()  # nothing happens if it has ended already
        code = process.wait()
        with suppress(BrokenPipeError):  # closing flushes
            process.stdin.close()
        process.stdout.close()
        errors.seek(0)
        with errors:
            return code, errors.read()
