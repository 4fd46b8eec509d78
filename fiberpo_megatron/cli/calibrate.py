"""`fiberpo calibrate` measures this machine, for `fiberpo plan --calibration FILE` and for what a run expects."""

import argparse
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import ConfigError, load_config
from fiberpo_megatron.planning.calibration import FILE


def add_parser(commands: Any, overrides: str) -> None:
    """Add the command and its options."""
    about = "measure products, memory, links, passes and decoding on this machine, for plans"
    parser = commands.add_parser("calibrate", help=about, description=f"{about}; {overrides}. See docs/planning.md")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="whose model, layout and engine")
    parser.add_argument("--out", type=Path, default=Path(FILE), metavar="FILE", help=f"default {FILE}")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command; return 0 when the file is written."""
    from fiberpo_megatron.calibration.calibrate import calibrate
    from fiberpo_megatron.engines.errors import EngineError

    if overrides and options.config is None:
        raise ConfigError(f"{overrides[0]} overrides a config, but none is given; write fiberpo calibrate CONFIG.toml")
    config = load_config(options.config, overrides) if options.config else None
    if config is not None and not (config.model.path / "config.json").is_file():
        raise ConfigError(f"model.path = {config.model.path}: there is no config.json; a calibration needs that file")
    try:
        found = calibrate(config, lambda text: print(text, flush=True))
    except (EngineError, RuntimeError) as error:
        raise ValueError(f"the calibration failed: {error}") from error
    if found is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found.write(options.out)
        print(f"Calibration: {options.out} ({len(found.constants)} constants, {len(found.measurements)} measurements)")
    return 0
