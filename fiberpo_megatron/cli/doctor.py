"""`fiberpo doctor` checks whether a run can work on this machine, and names the fix for what cannot."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.printable import printable


def add_parser(commands: Any, overrides: str) -> None:
    """Add the command and its options."""
    about = "check this machine, its software and a config"
    parser = commands.add_parser("doctor", help=about, description=f"{about}; {overrides}. See docs/doctor.md")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command; return 0 when nothing failed."""
    from fiberpo_megatron.doctor import examination, report

    found = examination.full(load_config(options.config, overrides) if options.config else None)
    if os.environ.get("RANK", "0") == "0":
        if options.json:
            print(report.as_json(found))
        else:
            report.print_table(found)
    return report.exit_code(found)


def warn(config: Config) -> None:
    """Print what may go wrong at the start of a run, one line per finding, on stderr. Raises RuntimeError if ranks are
    missing."""
    from fiberpo_megatron.doctor import examination

    found = examination.before_a_run(config)
    for finding in found:
        fix = f". {finding.fix}" if finding.fix else ""
        line = f"fiberpo: {finding.status}: {finding.check}: {finding.seen}{fix}"
        print(printable(line, keep="\n\t"), file=sys.stderr, flush=True)
    for finding in found:
        if (finding.check, finding.status) == ("ranks", "fail"):
            raise RuntimeError(f"{finding.seen}. {finding.fix}")
