"""This module defines findings, sets the deadline around every check, and shows findings."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fiberpo_megatron.printable import printable

Status = Literal["pass", "warn", "fail"]
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """This is what one check saw."""

    check: str
    status: Status
    seen: str
    fix: str = ""
    """It is empty for a pass."""


Check = Callable[[], Sequence[Finding]]


def examine(name: str, check: Check, deadline_s: float) -> list[Finding]:
    """Return the check's findings. A check that raises, or has not returned after `deadline_s`, is a failure of that
    name."""
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check())
        except Exception as error:  # a broken check must not hide the others
            found.append(Finding(name, "fail", f"{type(error).__name__}: {error}", "See the message"))

    thread = threading.Thread(target=work, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        seen = f"it gave no answer within {deadline_s:g} s"
        return [Finding(name, "fail", seen, "The file system, driver or host that it asks hangs")]
    return found


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if something failed, else 0; warnings do not count."""
    return int(any(finding.status == "fail" for finding in findings))


def as_json(findings: Sequence[Finding]) -> str:
    """Return {"ok": .., "findings": [..]} as text."""
    return json.dumps({"ok": not exit_code(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)


def print_table(findings: Sequence[Finding]) -> None:
    """Print the findings as a table on stdout."""
    table = Table(*(Column(name, overflow="fold") for name in ("check", "", "seen", "fix")))  # paths are not cut
    for finding in findings:
        colour = _COLOURS[finding.status]
        texts = (finding.check, finding.seen, finding.fix)
        check, *said = (Text(printable(text, keep="\n\t")) for text in texts)  # Text: no markup in it
        table.add_row(check, Text(finding.status, style=colour), *said)
    Console().print(table)
