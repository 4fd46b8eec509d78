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
    parser.add_argument("--search", action="store_true", help="propose layouts, the best that fits first, and say why")
    parser.add_argument(
        "--price",
        type=float,
        metavar="P",
        help="with --search: price of a GPU for an hour; the cheapest run comes first",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="with --search: steps of the run; default trainer.steps")
    parser.add_argument(
        "--staleness",
        type=int,
        metavar="S",
        help="steps by which sampling may run ahead of training, default rollout.staleness; with --search the largest "
        "that is tried, default 4",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="draw what bounds each phase, of the best plan with --search"
    )
    parser.add_argument(
        "--scale", action="store_true", help="show the config's model on 8 to 10240 GPUs; takes --gpu, not --gpus"
    )
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command; return 0 if the plan fits (with --search: if any layout does), else 1."""
    from fiberpo_megatron.mcore.families import read_hf_config
    from fiberpo_megatron.planning import show
    from fiberpo_megatron.planning.calibration import calibrated
    from fiberpo_megatron.planning.estimate import keeping, make_plan
    from fiberpo_megatron.planning.hardware import GPUS
    from fiberpo_megatron.planning.timing import GIGA

    if options.published is not None:
        return _published(options)
    if options.config is None or (options.gpus is None) != options.scale:
        raise ConfigError("give CONFIG.toml and --gpus N, CONFIG.toml and --scale, or --published")
    _check_search(options)
    config = load_config(options.config, overrides)
    path = config.model.path / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path = {config.model.path}: there is no {path}; a plan needs config.json alone")
    if options.gpu is not None and options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu} is not known; choose from {', '.join(GPUS)}")
    if options.gpus is not None and options.gpus < 1:
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
    if options.scale:
        return _scale(options, *arguments)
    if options.search:
        return _search(options, *arguments)
    staleness = config.rollout.staleness if options.staleness is None else options.staleness
    drain = not staleness or config.rollout.partial == "drain"
    plan = make_plan(*arguments, staleness=staleness, drain=drain)
    fuller = None
    if not plan.problems and plan.most_kept_forwards > config.kept_forwards:
        changed = keeping(config, plan.most_kept_forwards)
        fuller = make_plan(changed, *arguments[1:], staleness=staleness, drain=drain)
    print(json.dumps(show.plan_json(plan), indent=1) if options.json else show.plan_text(plan, fuller))
    _draw(options, plan, arguments[-1])
    return 1 if plan.problems else 0


def _check_search(options: argparse.Namespace) -> None:
    """Raise ConfigError for options that nothing would read, or that have impossible values."""
    for name in ("price", "steps"):
        value = getattr(options, name)
        if value is not None and not options.search:
            raise ConfigError(f"--{name} {value} belongs to --search")
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value} must be above 0")
    if options.staleness is not None and options.staleness < 0:
        raise ConfigError(f"--staleness {options.staleness} must be 0 or more")
    for name in ("search", "picture", "staleness"):
        if options.scale and getattr(options, name):
            raise ConfigError(f"--scale and --{name} do not go together; plan one number of GPUs with --gpus")


def _search(
    options: argparse.Namespace, config: Any, hf_config: Any, gpus: int, memory: float, gpu: Any, assumptions: Any
) -> int:
    """Print the best plans; return 0 if any fits, else 1."""
    from fiberpo_megatron.planning import show
    from fiberpo_megatron.planning.explain import found_text, limit_lines, reason_lines
    from fiberpo_megatron.planning.options import settings
    from fiberpo_megatron.planning.search import STALENESS, Goal, propose
    from fiberpo_megatron.planning.timing import GIGA

    largest = max(STALENESS) if options.staleness is None else options.staleness
    staleness = tuple(sorted({0, largest, *(value for value in STALENESS if value < largest)}))
    goal = Goal(options.price, options.steps or config.trainer.steps, staleness)
    found = propose(config, hf_config, gpus, memory, gpu, assumptions, goal=goal)
    if options.json:
        plans = [
            show.plan_json(plan)
            | {"gpus": candidate.gpus, "staleness": candidate.staleness, "settings": settings(plan)}
            | {"cost": goal.cost(plan, candidate.gpus)}
            for candidate, plan in zip(found.candidates, found.plans)
        ]
        words = [*limit_lines(found.plans[0], assumptions), *reason_lines(found)] if plans else []
        print(json.dumps({"plans": plans, "why": words}, indent=1))
    elif found.plans:
        print(found_text(found, goal, assumptions))
    else:
        print(f"No layout of {gpus} GPUs with {memory / GIGA:.0f} GB fits; more GPUs or shorter rows would help")
    if found.plans:
        _draw(options, found.plans[0], assumptions)
    return 0 if found.plans else 1


def _draw(options: argparse.Namespace, plan: Any, assumptions: Any) -> None:
    """Write the picture that was asked for."""
    from fiberpo_megatron.planning.picture import roofline_svg

    if options.picture is None:
        return
    try:
        options.picture.write_text(roofline_svg(plan, assumptions), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--picture {options.picture}: it cannot be written: {error.strerror}") from error


def _scale(options: argparse.Namespace, config: Any, hf_config: Any, _: Any, *machine: Any) -> int:
    """Print the config's model on growing numbers of GPUs; return 0 if any fits, else 1."""
    from fiberpo_megatron.planning.scale import scale, scale_json, scale_text

    rows = scale(config, hf_config, *machine)
    print(json.dumps(scale_json(rows), indent=1) if options.json else scale_text(rows))
    return 0 if any(row.plan is not None for row in rows) else 1


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
