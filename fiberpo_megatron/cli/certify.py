"""This module runs `fiberpo certify CONFIG`: it shows what depends on layout and order, and by how much."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import ConfigError, load_config
from fiberpo_megatron.printable import printable


def add_parser(commands: Any, overrides: str) -> None:
    """Add the command and its options."""
    about = "compare layouts, micro-batches and orders on this machine, and write a certificate"
    parser = commands.add_parser("certify", help=about, description=f"{about}; {overrides}. See docs/certify.md")
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="a dumped step, or another framework's coefficients")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="the most processes at a time (default 2)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: <run folder>/certify")
    parser.add_argument("--gates-only", action="store_true", help="leave the whole training step of a model out")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest relative difference of another framework's coefficients"
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command; return 0 when every comparison is within its bound, else 1."""
    from fiberpo_megatron.certify.certificate import certify
    from fiberpo_megatron.certify.page import write

    config = load_config(options.config, overrides)
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: at least 1 process is needed")
    if not 0 <= options.tolerance < 1:
        raise ConfigError(f"--tolerance {options.tolerance}: use a number from 0 to below 1")
    if not options.gates_only and not (config.model.path / "config.json").is_file():
        raise ConfigError(
            f"model.path = {config.model.path}: there is no config.json, whose architecture the training step takes; "
            "name another model with --model.path, or leave the training step out with --gates-only"
        )
    folder = options.out or config.run.folder / "certify"
    certificate = certify(
        config,
        command=shlex.join(_command(options, overrides)),
        dump=options.dump,
        ranks=options.ranks,
        gates_only=options.gates_only,
        tolerance=options.tolerance,
        say=lambda line: print(printable(line, keep="\n\t"), flush=True),
    )
    page = write(certificate, folder)
    for what, error in certificate.failures:
        print(printable(f"{what} broke off: {error.strip().splitlines()[-1]}", keep="\n\t"))
    print(f"{'Passed' if certificate.passed else 'NOT PASSED'}: {page}")
    return 0 if certificate.passed else 1


def _command(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    words = ["fiberpo", "certify", str(options.config)]
    for name in ("dump", "out"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value is not None else []
    words += ["--ranks", str(options.ranks)]
    words += ["--gates-only"] if options.gates_only else []
    words += ["--tolerance", str(options.tolerance)] if options.tolerance != 1e-5 else []
    return [*words, *overrides]
