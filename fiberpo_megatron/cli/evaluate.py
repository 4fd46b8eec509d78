"""Evaluate a model, or the checkpoints of a run from beside it: `fiberpo eval`."""

import argparse
import tomllib
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import load_config
from fiberpo_megatron.run_lock import refuse

FOLDER = "evaluations"
"""Folder in the run folder that belongs to the evaluating process: its config.toml, metrics.jsonl, lock and logs."""


def add_parser(commands: Any, about_overrides: str) -> None:
    """Add the command and its options."""
    about = "accuracy of a model on the evaluation sets; with a run folder, of the run's checkpoints"
    parser = commands.add_parser("eval", help=about, description=f"{about}; {about_overrides}. See docs/evaluation.md")
    parser.add_argument("config", type=Path, metavar="CONFIG.toml|RUN_FOLDER")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--follow", action="store_true", help="every checkpoint of the run, until the run has ended")
    which.add_argument("--once", action="store_true", help="the checkpoints that the run folder holds now")
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint after N steps alone")
    which.add_argument(
        "--compare",
        type=int,
        nargs=2,
        metavar=("A", "B"),
        help="write the same prompts after A and B steps side by side",
    )


def of_a_run(options: argparse.Namespace) -> bool:
    """Return whether the command is about a run folder. Raises ValueError when its options do not fit."""
    asked = options.follow or options.once or options.step is not None or options.compare is not None
    if options.config.is_dir():
        if not asked:
            raise ValueError(
                f"{options.config} is a folder; say which of its checkpoints are evaluated: --follow, --once or --step"
            )
        return True
    if asked:
        raise ValueError(
            f"{options.config} is no run folder; --follow, --once, --step and --compare need the folder of a run"
        )
    return False


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Evaluate checkpoints of the run, or compare two that were evaluated; return the exit code."""
    folder: Path = options.config
    if options.compare is not None:
        from fiberpo_megatron.evaluation.compare import write_comparison

        path, summary = write_comparison(folder, *options.compare)
        print(f"{summary}\n{path}")
        return 0
    if not (folder / "config.toml").is_file():
        raise FileNotFoundError(
            f"{folder} holds no run: it has no config.toml; give the folder of a run that has begun"
        )
    from fiberpo_megatron.cli.main import local_world_size
    from fiberpo_megatron.launch.local import launch_ranks
    from fiberpo_megatron.trainer.preflight import preflight

    overrides = [*beside(folder), *overrides]
    config = load_config(folder / "config.toml", overrides)
    world_size = local_world_size(config)
    preflight(config, "eval", False, world_size)
    refuse(config.run.folder)
    words = ["follow", str(folder / "config.toml"), "--of", str(folder)]
    words += [] if options.follow else ["--once"]
    words += [] if options.step is None else ["--step", str(options.step)]
    return launch_ranks(
        ["-m", "fiberpo_megatron.cli.rank", *words, *overrides],
        world_size,
        config.run.folder / "logs",
        {"OMP_NUM_THREADS": str(config.run.threads_per_rank)},
    )


def beside(folder: Path) -> list[str]:
    """Return the overrides with which a run's config evaluates its checkpoints: one rank, and an engine of its own.

    The run's engines are never touched. Overrides of the command line come after these.
    """
    import torch

    values = tomllib.loads((folder / "config.toml").read_text())
    settings: dict[str, str] = {"run.folder": str(folder / FOLDER)}
    settings |= {f"parallel.{name}": "1" for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert")}
    settings |= {"parallel.expert_tensor": "1", "parallel.data": "1"}
    experts = values.get("parallel", {}).get("expert", 1)
    if experts > 1 and "expert_partitions" not in values.get("algorithm", {}):
        settings["algorithm.expert_partitions"] = str(experts)
    if values.get("rollout", {}).get("engine", {}).get("urls"):
        settings["rollout.engine.urls"] = "[]"
    settings["rollout.engine.count"] = "1"
    settings["rollout.engine.colocated"] = "true" if torch.cuda.device_count() == 1 else "false"
    settings["weight_sync.method"] = "disk"
    settings["weight_sync.folder"] = str((folder / FOLDER / "published").resolve())
    settings |= {"telemetry.sinks": "[]", "storage.dump": "false", "storage.unfinished": "false"}
    return [word for name, value in settings.items() for word in (f"--{name}", value)]
