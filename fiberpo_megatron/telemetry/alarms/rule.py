"""This module says what an alarm rule is: which figure it looks at, its limit, and what it advises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fiberpo_megatron.telemetry.alarms.history import FIRST, SMOOTH, History
from fiberpo_megatron.telemetry.metrics import Kind, describe, format_value


@dataclass(frozen=True)
class Seen:
    """Holds what a rule sees in the newest records."""

    metric: str
    """Name of the metric; of several the one that stands out."""
    value: float
    """What is compared with the rule's limit."""
    message: str
    """What was seen, in one sentence that needs no other one."""
    rank: int | None = None
    """Training rank that it is about; the alarm then names its machine."""


class AlarmRule(Protocol):
    """This is what a rule of your own has (docs/alarms.md): class attributes or fields, and one method."""

    @property
    def name(self) -> str:
        """Return the name of its alarms."""
        ...

    @property
    def limit(self) -> float:
        """Return the value beyond which a reading is bad."""
        ...

    @property
    def causes(self) -> tuple[str, ...]:
        """Return likely causes, the most likely first."""
        ...

    @property
    def setting(self) -> str:
        """Return the setting to try, and how: "optimizer.learning_rate: halve it"."""
        ...

    def look(self, history: History) -> Seen | None:
        """Return what the newest records show; None when they say nothing about it, which changes nothing."""
        ...


@dataclass(frozen=True)
class Rule:
    """This is a built-in rule: data, and a function that reads the history.

    An alarm is raised after `steps` bad readings one after the other and cleared after `calm` good ones. Between the
    limit and `margin` of it a reading is neither, so that an alarm does not flap.
    """

    name: str
    about: str
    """What is wrong when it is raised; docs/alarms.md has it."""
    limit: float
    of: str
    """What the limit is compared with, in words."""
    read: Callable[[History], Seen | None]
    causes: tuple[str, ...]
    setting: str
    kind: Kind = "train"
    """Kind of the records after which it looks."""
    below: bool = False
    """Whether values below the limit are bad; else those above it."""
    steps: int = 3
    calm: int = 5
    margin: float = 0.2

    def look(self, history: History) -> Seen | None:
        """Return what the newest records show; None when they say nothing about it."""
        return self.read(history)


def level(metric: str, kind: Kind = "train", window: int = SMOOTH) -> Callable[[History], Seen | None]:
    """Return a reading of the median of a metric over the last `window` records."""

    def read(history: History) -> Seen | None:
        value = history.now(metric, window, kind)
        if value is None:
            return None
        shown = format_value(metric, value)
        return Seen(metric, value, f"{metric} ({describe(metric).title}) is {shown}, the median of {window} records")

    return read


def relative(
    metric: str, floor: float = 0.0, fine: Callable[[History], bool] | None = None
) -> Callable[[History], Seen | None]:
    """Return a reading of a metric's median over the last SMOOTH records as a multiple of that over the first FIRST.

    Both count as at least `floor`, so that noise around nothing is no growth. While `fine` says so the value is 1, as
    at the start.
    """

    def read(history: History) -> Seen | None:
        now, start = history.now(metric), history.start(metric)
        if now is None or start is None or max(start, floor) <= 0:
            return None
        value = 1.0 if fine is not None and fine(history) else max(now, floor) / max(start, floor)
        shown, before = format_value(metric, now), format_value(metric, start)
        words = f"{metric} ({describe(metric).title}) is {shown} after {before} in the first {FIRST} steps"
        return Seen(metric, value, words)

    return read
