"""`fiberpo plan` shows what a run needs, before there are GPUs."""

import argparse
import json
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import ConfigError, load_config


def add_parser(commands: Any, overrides: str) -> None:
    """Add the command and its options."""
    about = "show memory, time and traffic of a run on GPUs that need not exist here"
    parser = commands.add_parser("plan", help=about, description=f"{about}; {overrides}. See docs/planning.md")
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs for training and engines together")
    parser.add_argument("--gpu", metavar="NAME", help="H100 (default) or another of docs/planning.md")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="use what `fiberpo calibrate` measured")
    parser.add_argument(
        "--published",
        nargs="?",
        const="",
        metavar="FILE",
        help="print predicted beside published step times: those of this package, or of a JSON file of your own",
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU; default: that GPU's")
    parser.add_argument("--search", action="store_true", help="propose layouts, the fastest that fits first")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command; return 0 if the plan fits (with --search: if any layout does), else 1."""
    from fiberpo_megatron.mcore.families import read_hf_config
    from fiberpo_megatron.planning import show
    from fiberpo_megatron.planning.calibration import calibrated
    from fiberpo_megatron.planning.estimate import make_plan
    from fiberpo_megatron.planning.hardware import GPUS
    from fiberpo_megatron.planning.search import propose
    from fiberpo_megatron.planning.timing import GIGA

    if options.published is not None:
        return _published(options)
    if options.config is None or options.gpus is None:
        raise ConfigError("give CONFIG.toml and --gpus N, or --published")
    config = load_config(options.config, overrides)
    path = config.model.path / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path = {config.model.path}: there is no {path}; a plan needs config.json alone")
    if options.gpu is not None and options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu} is not known; choose from {', '.join(GPUS)}")
    if options.gpus < 1:
        raise ConfigError(f"--gpus {options.gpus}: at least 1 is needed")
    gpu = GPUS[options.gpu or "H100"]
    measured = None
    if options.calibration is not None:
        measured = _calibration(options)
        gpu = measured.gpu(config.model.dtype)
    memory = (options.gpu_memory or gpu.memory_gb) * GIGA
    arguments = (
        config,
        read_hf_config(config.model.path, config.model.family),
        options.gpus,
        memory,
        gpu,
        calibrated(measured, options.assume),
    )
    if not options.search:
        plan = make_plan(*arguments)
        print(json.dumps(show.plan_json(plan), indent=1) if options.json else show.plan_text(plan))
        return 1 if plan.problems else 0
    plans = propose(*arguments)
    if options.json:
        print(json.dumps([show.plan_json(plan) for plan in plans], indent=1))
    elif plans:
        print(show.table(show.LAYOUT_HEADINGS, [show.layout_row(plan) for plan in plans]))
    else:
        print(
            f"No layout of {options.gpus} GPUs with {memory / GIGA:.0f} GB fits; more GPUs or shorter rows would help"
        )
    return 0 if plans else 1


def _calibration(options: argparse.Namespace) -> Any:
    """Return the calibration that is named. Raises ConfigError where it cannot be used."""
    from fiberpo_megatron.planning.calibration import read_calibration, vendor_row

    path = options.calibration
    try:
        found = read_calibration(path)
    except OSError as error:
        raise ConfigError(f"--calibration {path}: it cannot be read: {error.strerror}") from error
    device = str(found.machine["device"])
    row = vendor_row(device)
    if options.gpu is not None and options.gpu != (row.name if row else device):
        raise ConfigError(f"--gpu {options.gpu}: {path} was measured on {device}; leave --gpu out")
    return found


def _published(options: argparse.Namespace) -> int:
    """Print predicted beside published step times; return 0."""
    from fiberpo_megatron.planning.hardware import assume
    from fiberpo_megatron.planning.ledger import compare, published_json, published_text
    from fiberpo_megatron.planning.published import built_in, note_unread, read_points

    path = Path(options.published)
    try:
        points = read_points(path) if options.published else built_in()
    except OSError as error:
        raise ConfigError(f"--published {path}: it cannot be read: {error.strerror}") from error
    note_unread(points)
    comparisons = compare(points, assume(options.assume))
    print(json.dumps(published_json(comparisons), indent=1) if options.json else published_text(comparisons))
    return 0
