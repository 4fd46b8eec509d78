"""This module runs the tool calls of a policy's turn and writes what goes back to it: the result, or what was wrong.

It imports the standard library alone and runs on Python 3.10.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.environments import Message, Task, ToolCall
from fiberpo_megatron.environments.builtin.tool_schema import Tool, problem_with

TIME_OUTS = (TimeoutError, asyncio.TimeoutError)
"""In Python 3.10 they are different classes."""
STOP_S = 1.0
"""How long a function may take to end after it was interrupted."""


class ToolStuck(RuntimeError):
    """Is raised for a tool that neither returned in time nor ended when it was interrupted; its worker must end."""


class _Interrupted(BaseException):
    """Is raised in the thread of a function whose time is over; an `except Exception` does not catch it."""


@dataclass
class ToolCounts:
    """Counts the tool calls of one trajectory."""

    calls: int = 0
    errors: int = 0
    """Calls that were answered with an error, time-outs among them."""
    timeouts: int = 0

    def metrics(self) -> dict[str, float]:
        """Return the counts as metrics of an outcome."""
        return {
            "tool_calls": float(self.calls),
            "tool_errors": float(self.errors),
            "tool_timeouts": float(self.timeouts),
            "used_tool": float(self.calls > self.errors),
        }


class ToolError(Exception):
    """Says why a call has no result; the policy reads the message."""


@dataclass(frozen=True)
class ToolCaller:
    """Runs tool calls. `timeout_s`: time of one call. `longest`: characters of one result. `most`: calls of a turn."""

    tools: Mapping[str, Tool]
    timeout_s: float
    longest: int
    most: int

    async def answers(self, calls: Sequence[ToolCall], task: Task, counts: ToolCounts) -> list[Message]:
        """Return one message with the role `tool` for each call, in order; the calls run at the same time.

        Raises ToolStuck for a function that cannot be ended.
        """
        texts = await asyncio.gather(*(self._answer(number, call, task, counts) for number, call in enumerate(calls)))
        return [
            {"role": "tool", "content": text, "name": call.name, "tool_call_id": call.id or f"call_{number}"}
            for number, (call, text) in enumerate(zip(calls, texts))
        ]

    async def _answer(self, number: int, call: ToolCall, task: Task, counts: ToolCounts) -> str:
        counts.calls += 1
        try:
            if number >= self.most:
                raise ToolError(f"only {self.most} tool calls are allowed in one turn")
            return self._cut(await self._result(call, task))
        except ToolError as error:
            counts.errors += 1
            return self._cut(f"Error: {error}")
        except TIME_OUTS:
            counts.errors += 1
            counts.timeouts += 1
            return f"Error: {call.name} took longer than {self.timeout_s:g} s and was stopped"

    async def _result(self, call: ToolCall, task: Task) -> str:
        tool = self.tools.get(call.name)
        if tool is None:
            raise ToolError(f"there is no tool {call.name!r:.100}; the tools are {', '.join(self.tools)}")
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ToolError(f"the arguments of {call.name} are not JSON: {error}") from None
        problem = problem_with(arguments, {"type": "object", **tool.schema["function"]["parameters"]})
        if problem is not None:
            raise ToolError(f"{call.name}: {problem}")
        if tool.task_argument is not None:
            arguments[tool.task_argument] = task
        try:
            if inspect.iscoroutinefunction(tool.call) or inspect.iscoroutinefunction(type(tool.call).__call__):
                limit_s = None if tool.bounds_itself else self.timeout_s
                value = await asyncio.wait_for(tool.call(**arguments), limit_s)
            else:
                value = await self._in_thread(lambda: tool.call(**arguments), call.name)
        except (ToolError, ToolStuck, *TIME_OUTS):
            raise
        except Exception as error:  # a tool of somebody else's raises what it likes, and the policy should read it
            raise ToolError(f"{call.name} failed with {type(error).__name__}: {error}") from error
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    async def _in_thread(self, function: Callable[[], Any], name: str) -> Any:
        """Return what a function returns in a thread. Raises TimeoutError when it was ended after its time."""
        running = _Interruptible(function)
        future = asyncio.get_running_loop().run_in_executor(None, running)
        done, _ = await asyncio.wait([future], timeout=self.timeout_s)
        if done:
            return future.result()
        running.interrupt()
        done, _ = await asyncio.wait([future], timeout=STOP_S)
        if not done:
            raise ToolStuck(
                f"the tool {name} took longer than {self.timeout_s:g} s (tool_timeout_s) and could not be interrupted; "
                "give what it waits for a time-out of its own"
            )
        future.exception()  # the interruption, or what the function made of it: its time is over in any case
        raise TimeoutError

    def _cut(self, text: str) -> str:
        if len(text) <= self.longest:
            return text.encode(errors="replace").decode()  # half a character cannot become tokens
        note = f"\n... ({len(text) - self.longest} more characters were left out)"
        return text[: self.longest].encode(errors="replace").decode() + note


class _Interruptible:
    """Calls a function, in which another thread may raise `_Interrupted`: Python code ends at its next step."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._too_late = self._interrupted = False

    def __call__(self) -> Any:
        try:
            with self._lock:
                if self._too_late:  # its time was over before a thread was free
                    raise TimeoutError
                self._thread = threading.get_ident()
            try:
                return self._function()
            finally:
                with self._lock:
                    self._thread = None
                if self._interrupted:  # wait for the exception, so that it hits nothing else in this thread
                    time.sleep(0.05)
        except _Interrupted:
            raise TimeoutError from None

    def interrupt(self) -> None:
        """Raise `_Interrupted` in the function if it runs, and do not begin it otherwise."""
        with self._lock:
            self._too_late = True
            if self._thread is not None:
                self._interrupted = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Interrupted))
