"""This module applies alarm rules to the records of a run, one record after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fiberpo_megatron.printable import printable
from fiberpo_megatron.telemetry.alarms.history import History
from fiberpo_megatron.telemetry.alarms.record import Alarm, Severity
from fiberpo_megatron.telemetry.alarms.rule import AlarmRule, Rule, Seen
from fiberpo_megatron.telemetry.metrics import Kind


@dataclass
class _State:
    """Holds where a rule stands."""

    bad: int = 0
    """Bad readings one after the other."""
    good: int = 0
    """Good readings one after the other while the alarm is raised."""
    since: int = 0
    """Step of the first of the bad readings."""
    raised: bool = False


@dataclass(frozen=True)
class WatchedRule:
    """This is a rule as the config has it."""

    rule: AlarmRule
    limit: float
    severity: Severity = "warning"
    steps: int = 3
    calm: int = 5
    margin: float = 0.2
    below: bool = False
    kind: Kind = "train"

    @classmethod
    def of(
        cls, rule: AlarmRule, limit: float | None = None, severity: Severity = "warning", steps: int | None = None
    ) -> "WatchedRule":
        """Return the rule with its own values where none are given; a rule of your own may leave most of them out."""
        plain = Rule("", "", 0.0, "", lambda history: None, (), "")
        own = {name: getattr(rule, name, getattr(plain, name)) for name in ("calm", "margin", "below", "kind")}
        return cls(
            rule,
            rule.limit if limit is None else limit,
            severity,
            getattr(rule, "steps", plain.steps) if steps is None else steps,
            **own,
        )

    def is_bad(self, value: float) -> bool:
        """Return whether a value is beyond the limit."""
        return value < self.limit if self.below else value > self.limit

    def is_good(self, value: float) -> bool:
        """Return whether a value is so far on the right side of the limit that an alarm may clear."""
        away = self.margin * abs(self.limit)
        return value >= self.limit + away if self.below else value <= self.limit - away


class AlarmWatch:
    """Watches a stream of records. Its state follows from the records alone: a resumed run shows it the old ones."""

    def __init__(self, rules: Sequence[WatchedRule], hosts: Sequence[str] = ()) -> None:
        """`hosts` are the machines of the training ranks, for alarms that name a rank."""
        self._rules, self._hosts = tuple(rules), tuple(hosts)
        self._states = {watched.rule.name: _State() for watched in rules}
        self._history = History()

    @property
    def raised(self) -> list[str]:
        """Return the names of the rules whose alarms are raised now."""
        return [name for name, state in self._states.items() if state.raised]

    def see(self, kind: Kind, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Take the next record and return what it raises or clears."""
        self._history.add(kind, step, metrics)
        found = []
        for watched in self._rules:
            if watched.kind == kind:
                seen = watched.rule.look(self._history)
                alarm = None if seen is None else self._judged(watched, kind, step, seen)
                found += [] if alarm is None else [alarm]
        return found

    def _judged(self, watched: WatchedRule, kind: Kind, step: int, seen: Seen) -> Alarm | None:
        state = self._states[watched.rule.name]
        if watched.is_bad(seen.value):
            state.since = step if state.bad == 0 and not state.raised else state.since
            state.bad, state.good = state.bad + 1, 0
            if state.raised or state.bad < watched.steps:
                return None
            state.raised = True
            return self._alarm(watched, kind, step, seen, state)
        state.bad = 0
        if not state.raised:
            return None
        state.good = state.good + 1 if watched.is_good(seen.value) else 0
        if state.good < watched.calm:
            return None
        state.raised, state.good = False, 0
        return self._alarm(watched, kind, step, seen, state)

    def _alarm(self, watched: WatchedRule, kind: Kind, step: int, seen: Seen, state: _State) -> Alarm:
        rule = watched.rule
        where = "" if seen.rank is None or seen.rank >= len(self._hosts) else f" (machine {self._hosts[seen.rank]})"
        return Alarm(
            step=step,
            kind=kind,
            rule=rule.name,
            state="raised" if state.raised else "cleared",
            metric=seen.metric,
            value=seen.value if isfinite(seen.value) else None,
            limit=watched.limit,
            since=state.since,
            message=printable(f"{seen.message}{where}; the limit is {watched.limit:.3g}"),
            causes=tuple(rule.causes),
            setting=rule.setting,
            severity=watched.severity,
        )
