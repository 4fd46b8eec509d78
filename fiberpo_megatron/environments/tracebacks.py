"""This module describes the errors of a user's class, also of one that raises when it is shown. Its texts are safe to
print: an error may quote what the policy or another program said."""

from __future__ import annotations

import asyncio
import traceback
from types import FrameType
from typing import Any

from fiberpo_megatron.environments.wire import InvalidReply
from fiberpo_megatron.printable import printable


def describe_error(error: BaseException) -> str:
    if isinstance(error, InvalidReply):
        return printable(str(error), keep="\n\t")
    try:
        return printable(f"{type(error).__name__}: {error}", keep="\n\t")
    except Exception as another:  # a class of somebody else's raises what it likes, also when it is shown
        return f"{type(error).__name__}, whose text raises {type(another).__name__}"


def trace_of(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-20))
        return printable(text, keep="\n\t")
    except Exception as another:
        return f"(no traceback: {type(another).__name__})"


def where(task: asyncio.Task[Any]) -> str:
    """Return the traceback of a coroutine that waits, down to what it waits in."""
    frames: list[FrameType] = []
    waiting: Any = task.get_coro()
    while waiting is not None and len(frames) < 50:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is None:
            break
        frames.append(frame)
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    summary = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames)
    return "It waited here:\n" + "".join(summary.format())
