"""This module defines the settings of alarms: [telemetry.alarms]."""

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from fiberpo_megatron.settings import PluginConfig, Section, as_plugin

FILE = "file:"


class AlarmRuleConfig(Section):
    """This changes one rule. A word alone stands for its `action`."""

    action: Literal["report", "stop", "off"] = "report"
    """report: the alarm is shown where metrics are. stop: the run also saves and stops on all ranks at the next safe
    point, with exit code 86. off: the rule is not looked at."""
    limit: float | None = None
    """Value beyond which readings are bad, in place of the rule's own (docs/alarms.md)."""
    steps: int | None = Field(None, ge=1)
    """Bad readings one after the other that raise the alarm, in place of the rule's own number."""


class AlarmsConfig(Section):
    enabled: bool = True
    """Watch the metrics of training and evaluation for what goes wrong, and write alarms.jsonl (docs/alarms.md)."""
    rules: dict[str, AlarmRuleConfig] = {}
    """Changes of single rules by their names: `rules.entropy_collapse = {limit = 0.4, action = "stop"}`, or
    `rules.idle_share = "off"`."""
    own: list[PluginConfig] = []
    """Rules of your own: import paths of classes, with their options (docs/extending.md). `rules` may change them
    too."""
    webhook: str | None = None
    """Address (http or https) to which every alarm is sent as JSON, or `file:PATH` of a file that holds it. Such
    addresses are secrets, and config.toml holds what is written here: prefer the file."""
    webhook_timeout_s: float = Field(10.0, gt=0)
    """Seconds for sending one alarm, and for what is left at the end of the run. Training never waits for it."""

    @field_validator("rules", mode="before")
    @classmethod
    def words_are_actions(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"action": rule} if isinstance(rule, str) else rule for name, rule in value.items()}

    @field_validator("own", mode="before")
    @classmethod
    def own_are_plugins(cls, value: Any) -> Any:
        return [as_plugin(rule) for rule in value] if isinstance(value, list) else value

    @field_validator("webhook")
    @classmethod
    def webhook_is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(FILE):
            check_address(value)
        return value

    def webhook_address(self) -> str | None:
        """Return the address, from its file if it has one. Raises ValueError, which does not show the address."""
        if self.webhook is None or not self.webhook.startswith(FILE):
            return self.webhook
        path = Path(self.webhook.removeprefix(FILE)).expanduser()
        try:
            address = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"telemetry.alarms.webhook: {path} cannot be read ({type(error).__name__})") from error
        check_address(address)
        return address


def check_address(address: str) -> None:
    """Raise ValueError for a text that is no http or https address. The message does not show it: it holds a secret."""
    try:
        parts = urlsplit(address)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or any(character.isspace() for character in address):
        raise ValueError(
            "telemetry.alarms.webhook is not an address; write https://HOST/PATH, or file:PATH of a file that holds it"
        )
