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
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs for training and engines together")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="A100, H100 (default), H200 or B200")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU; default: that GPU's")
    parser.add_argument("--search", action="store_true", help="propose layouts, the fastest that fits first")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command; return 0 if the plan fits (with --search: if any layout does), else 1."""
    from fiberpo_megatron.mcore.families import read_hf_config
    from fiberpo_megatron.planning import show
    from fiberpo_megatron.planning.estimate import make_plan
    from fiberpo_megatron.planning.hardware import GPUS, assume
    from fiberpo_megatron.planning.search import propose
    from fiberpo_megatron.planning.timing import GIGA

    config = load_config(options.config, overrides)
    path = config.model.path / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path = {config.model.path}: there is no {path}; a plan needs config.json alone")
    if options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu} is not known; choose from {', '.join(GPUS)}")
    if options.gpus < 1:
        raise ConfigError(f"--gpus {options.gpus}: at least 1 is needed")
    gpu = GPUS[options.gpu]
    memory = (options.gpu_memory or gpu.memory_gb) * GIGA
    arguments = (
        config,
        read_hf_config(config.model.path, config.model.family),
        options.gpus,
        memory,
        gpu,
        assume(options.assume),
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
