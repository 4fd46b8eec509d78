"""This module says to a user what is allowed but unwise: at a line of theirs, or on the console of a command."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

from fiberpo_megatron.printable import printable

_say: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)
"""What takes the messages in place of Python's warnings."""


def warn_user(message: str) -> None:
    """Give the user a warning: a UserWarning at the nearest caller that is not of this package.

    Inside `warnings_to` the message goes to the function that was given there.
    """
    say = _say.get()
    if say is not None:
        say(message)
        return
    frame: FrameType = sys._getframe()
    while _ours(frame) and frame.f_back is not None:
        frame = frame.f_back
    names = frame.f_globals
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=names.get("__name__"),
        registry=names.setdefault("__warningregistry__", {}),
    )


@contextmanager
def warnings_to(say: Callable[[str], None]) -> Iterator[None]:
    """Pass the messages of `warn_user` to `say` within a `with` block: `on_console`, or `nowhere`."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def on_console(message: str) -> None:
    """Print a warning on stderr, without the place in the source that Python's warnings name."""
    print(printable(f"fiberpo: warning: {message}", keep="\n\t"), file=sys.stderr, flush=True)


def nowhere(message: str) -> None:
    """Drop a warning, where another place gives it."""


def _ours(frame: FrameType) -> bool:
    """Whether a call is this package's own, or the constructor that `dataclass` generates for a class."""
    name = str(frame.f_globals.get("__name__", ""))
    generated = frame.f_code.co_filename == "<string>" and frame.f_code.co_name == "__init__"
    return generated or name.partition(".")[0] == "fiberpo_megatron"
