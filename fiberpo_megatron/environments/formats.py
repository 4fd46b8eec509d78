"""This module decides in a worker whether a text has the format that `format` of [[environments]] asks for.

It imports the standard library alone and runs on Python 3.10.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

COMPONENT, TIMEOUT = "format", "format_timeout"
"""Names of the component of the reward and of the metric."""


class _Expired(Exception):
    """Is raised inside of a search that has taken too long."""


class FormatCheck:
    """Tells whether texts have a format. Call it in the main thread, because it is interrupted by a signal.

    setting: "think", "boxed", or a mapping with `pattern` and `timeout_s`.
    """

    def __init__(self, setting: str | Mapping[str, Any]) -> None:
        self._named = None if isinstance(setting, Mapping) else NAMED[setting]
        if isinstance(setting, Mapping):
            self._pattern = re.compile(setting["pattern"], re.DOTALL)
            self._timeout_s = float(setting["timeout_s"])

    def __call__(self, text: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return (components, metrics) of a text: the component `format`, and for a pattern the metric
        `format_timeout`, which is 1 where the search was ended."""
        if self._named is not None:
            return {COMPONENT: float(self._named(text))}, {}
        found = within(self._timeout_s, lambda: self._pattern.search(text) is not None)
        return {COMPONENT: float(found is True)}, {TIMEOUT: float(found is None)}


def think(text: str) -> bool:
    """Return whether a text is one block of reasoning that ends with `</think>`, and an answer behind it.

    The block may begin with `<think>`; many chat templates write this tag at the end of the prompt.
    """
    reasoning, end, answer = text.partition("</think>")
    begun = reasoning.lstrip().removeprefix("<think>")
    return bool(end and answer.strip()) and "<think>" not in begun + answer and "</think>" not in answer


def boxed(text: str) -> bool:
    r"""Return whether a text has a `\boxed{...}` at whose end all braces are closed and that is not empty."""
    _, begin, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, character in enumerate(rest if begin else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return bool(rest[:place].strip())
    return False


NAMED: Mapping[str, Callable[[str], bool]] = {"think": think, "boxed": boxed}


def within(timeout_s: float, search: Callable[[], bool]) -> bool | None:
    """Return what `search` returns, or None when it takes longer than `timeout_s` seconds.

    Python's regular expressions look for signals while they search, so that an alarm can end one that would take years.
    A timer of the caller's goes on afterwards.
    """

    def expired(number: int, frame: FrameType | None) -> None:
        raise _Expired

    handler = signal.signal(signal.SIGALRM, expired)
    left, interval = signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        found = search()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return found
    except _Expired:
        return None
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
