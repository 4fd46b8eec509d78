"""This module brings a run's alarms to people: to the console and other sinks, to alarms.jsonl, and to a webhook."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiberpo_megatron import plugins
from fiberpo_megatron.plugins import PluginError
from fiberpo_megatron.settings import PluginConfig
from fiberpo_megatron.telemetry.alarms.record import ALARMS_FILE, Alarm, Severity, drop_alarms, write_alarm
from fiberpo_megatron.telemetry.alarms.rules import RULES
from fiberpo_megatron.telemetry.alarms.settings import AlarmsConfig
from fiberpo_megatron.telemetry.alarms.watch import AlarmWatch, WatchedRule
from fiberpo_megatron.telemetry.alarms.webhook import Webhook
from fiberpo_megatron.telemetry.metrics import Kind

if TYPE_CHECKING:
    from fiberpo_megatron.config.schema import Config

SETTING = "telemetry.alarms.own"
_log = logging.getLogger(__name__)


class Alarms:
    """Watches the records of a run on the rank that logs, and announces what its rules find."""

    def __init__(
        self,
        run_folder: Path,
        settings: AlarmsConfig,
        show: Callable[[Alarm], None],
        *,
        past: Sequence[Mapping[str, Any]] = (),
        first_step: int = 0,
        hosts: Sequence[str] = (),
    ) -> None:
        """Bring the rules to where the records `past` left them, and remove the events of steps that are repeated.

        `show` takes every event, as the sinks do. `hosts` are the machines of the training ranks.
        """
        self._path, self._show = run_folder / ALARMS_FILE, show
        self._watch = AlarmWatch(watched_rules(settings), hosts)
        drop_alarms(run_folder, first_step)
        for record in past:
            self._watch.see(record["kind"], record["step"], record)
        address = settings.webhook_address()
        self._webhook = None if address is None else Webhook(address, run_folder.name, settings.webhook_timeout_s)
        self._stopping: Alarm | None = None
        self._failed: set[str] = set()

    @property
    def stopping(self) -> str | None:
        """Return the words of the alarm that stops the run; None without one."""
        return None if self._stopping is None else self._stopping.text()

    def see(self, kind: Kind, step: int, metrics: Mapping[str, Any]) -> None:
        """Take a record, and announce what it raises or clears. Only an alarm that stops the run is more than words:
        an error of a rule or of a file is a warning."""
        try:
            found = self._watch.see(kind, step, metrics)
        except Exception as error:  # somebody else's rule raises what it likes
            self._warn("rules", f"the alarm rules failed at {kind} {step} ({type(error).__name__}: {error})")
            return
        for alarm in found:
            self._show(alarm)
            try:
                write_alarm(self._path, alarm)
            except OSError as error:
                self._warn("file", f"the alarm {alarm.rule} is not in {ALARMS_FILE}: {error}")
            if self._webhook is not None:
                self._webhook.send(alarm)
            if alarm.severity == "stop" and alarm.state == "raised":
                self._stopping = alarm

    def close(self) -> None:
        """Wait for the webhook."""
        if self._webhook is not None:
            self._webhook.close()

    def _warn(self, what: str, text: str) -> None:
        """Warn once of each kind of trouble: it would come again in every step."""
        if what not in self._failed:
            self._failed.add(what)
            _log.warning("%s; further ones are not reported", text)


def watched_rules(settings: AlarmsConfig) -> list[WatchedRule]:
    """Return the rules of a run with what the config changes in them. Raises PluginError for a rule of your own that
    cannot be used, and for a name that no rule has."""
    rules = [*RULES, *(_own(rule) for rule in settings.own)] if settings.enabled else []
    names = [rule.name for rule in rules]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PluginError(f"{SETTING}: two rules have the name {twice[0]!r}; give yours another one")
    unknown = sorted(settings.rules.keys() - set(names)) if settings.enabled else []
    if unknown:
        raise PluginError(
            f"telemetry.alarms.rules: there is no rule {unknown[0]!r}; the rules are {', '.join(sorted(names))}"
        )
    found = []
    for rule in rules:
        changed = settings.rules.get(rule.name)
        if changed is None:
            found.append(WatchedRule.of(rule))
        elif changed.action != "off":
            severity: Severity = "stop" if changed.action == "stop" else "warning"
            found.append(WatchedRule.of(rule, changed.limit, severity, changed.steps))
    return found


def _own(rule: PluginConfig) -> Any:
    plugin = plugins.find("alarms", rule.use, SETTING)
    plugins.require(plugin, ("look",), SETTING)
    plugins.check_options(plugin, rule.options, SETTING)
    plugins.check_version(plugin, rule.version, SETTING)
    made = plugin.target(**rule.options)
    for name, kind in (("name", str), ("limit", int | float), ("causes", list | tuple), ("setting", str)):
        if not isinstance(getattr(made, name, None), kind):
            raise PluginError(f"{SETTING}: {plugin.path} has no {name} of the right kind (docs/alarms.md); define it")
    return made


def check_alarms(config: "Config") -> None:
    """Raise ValueError when an alarm rule or the webhook's address cannot be used, before anything starts."""
    watched_rules(config.telemetry.alarms)
    config.telemetry.alarms.webhook_address()
