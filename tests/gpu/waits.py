"""Waits of the host for a real GPU, counted with their places in the source.

torch says of most operations that they make the host wait (`torch.cuda.set_sync_debug_mode`). It does not speak of
`torch.cuda.synchronize` and of `Event.synchronize`, which are counted here as well.
"""

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SOURCES = ("fiberpo_megatron/", "/megatron/", "/transformer_engine/", "/tests/")
MESSAGE = "called a synchronizing CUDA operation"
"""What torch's warning says."""


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count the waits of this process, by place (folder, file, line and function), inside the block."""
    found: Counter[str] = Counter()
    lock = threading.Lock()  # a backward pass runs in a thread of its own

    def count() -> None:
        at = _place()
        with lock:
            found[at] += 1

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if MESSAGE in str(message):
            count()

    def counting(wait: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            count()
            return wait(*arguments, **named)

        return counted

    before = torch.cuda.get_sync_debug_mode()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", message=MESSAGE)
        stack.enter_context(mock.patch.object(warnings, "showwarning", show))
        for owner in (torch.cuda, torch.cuda.Event):
            whole = owner.synchronize
            stack.enter_context(mock.patch.object(owner, "synchronize", counting(whole)))
        stack.callback(torch.cuda.set_sync_debug_mode, before)
        torch.cuda.set_sync_debug_mode("warn")
        yield found


def _place() -> str:
    """Return folder, file, line and function of the innermost frame of a package that waits, or of a test."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and any(part in name for part in SOURCES):
            path = Path(name)
            return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the packages"
