"""This module runs `fiberpo replay-step FILE`: the coefficients of a dumped step again, in one process."""

import argparse
from pathlib import Path
from typing import Any

from fiberpo_megatron.printable import printable


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    about = "compute the coefficients of a dumped training step again and compare them"
    parser = commands.add_parser(
        "replay-step",
        help=about,
        description=f"{about}. `fiberpo train --debug.dump_step N` writes the file; see docs/certify.md",
    )
    parser.add_argument("file", type=Path, metavar="FILE")


def run(options: argparse.Namespace) -> int:
    """Run the command; return 0 when all results are those of the run, else 1."""
    from fiberpo_megatron.certify.replay import replay, table

    result = replay(options.file)
    for line in table(result):
        print(printable(line, keep="\n\t"))
    return 0 if result.passed else 1
