"""This module names stretches of time for a profiler: phases of a step, micro-batches, the optimizer's step.

A part of the library writes `with span("optimizer"): ...`. That does nothing until a profile of this process begins
(`trainer/profiling.py`), whose trace then has the names. The module needs the standard library only, so that every part
may import it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Mark = Callable[[str], AbstractContextManager[object]]
"""Returns what marks a stretch of time with a name, in a trace for example."""

_nothing = nullcontext()
_mark: Mark | None = None


def span(name: str) -> AbstractContextManager[object]:
    """Return a context manager that marks its block with `name` while a profile runs, and does nothing otherwise."""
    return _nothing if _mark is None else _mark(name)


def marking() -> bool:
    """Return whether a profile of this process runs."""
    return _mark is not None


def mark_with(mark: Mark | None) -> None:
    """Mark all spans of this process with `mark` from now on; None ends that. A span that has begun is not affected."""
    global _mark
    _mark = mark
