"""`fiberpo train|sft|eval|report`: checks what can be checked at once, then starts the ranks."""

import argparse
import os
import sys
from pathlib import Path
from typing import Sequence

import fiberpo_megatron
from fiberpo_megatron.config import Config, ConfigError, load_config

_OVERRIDES = "further --section.key value pairs override the config, e.g. --parallel.tensor 2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. Errors are one message on stderr."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    try:
        if options.command == "report":
            if overrides:
                parser.error(f"unexpected arguments: {' '.join(overrides)}")
            return _report(options.folder)
        return _run(options, overrides)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"fiberpo: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fiberpo", description=fiberpo_megatron.__doc__)
    parser.add_argument("--version", action="version", version=f"fiberpo-megatron {fiberpo_megatron.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("train", "train by reinforcement learning"),
        ("sft", "supervised warm-up with the same policy code"),
        ("eval", "accuracy of a model on the held-out prompts"),
    ):
        command = commands.add_parser(name, help=about, description=f"{about}; {_OVERRIDES}")
        command.add_argument("config", type=Path, metavar="CONFIG.toml")
        if name != "eval":
            command.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    report = commands.add_parser("report", help="write report.html of a run folder")
    report.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    return parser


def _report(folder: Path) -> int:
    from fiberpo_megatron.telemetry.report import write_report

    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} does not exist")
    print(write_report(folder))
    return 0


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(options.config, overrides)
    check_inputs(config, options.command, getattr(options, "resume", False))
    flags = ["--resume"] if getattr(options, "resume", False) else []
    words = [options.command, str(options.config), *flags, *overrides]
    if "RANK" in os.environ:  # started by torchrun or srun: this process is a rank
        from fiberpo_megatron.cli.rank import main as run_rank

        return run_rank(words)
    from fiberpo_megatron.launch.local import launch_ranks

    return launch_ranks(
        ["-m", "fiberpo_megatron.cli.rank", *words],
        local_world_size(config),
        config.run.folder / "logs",
        {"OMP_NUM_THREADS": str(config.run.threads_per_rank)},
    )


def local_world_size(config: Config) -> int:
    """Ranks to start on this machine: the layout's, or one per GPU when the data-parallel size is left open."""
    import torch

    parallel = config.parallel
    gpus = torch.cuda.device_count()
    if parallel.data is None and gpus > parallel.world_size():
        return gpus // parallel.model_ranks * parallel.model_ranks
    return parallel.world_size()


def check_inputs(config: Config, command: str, resume: bool) -> None:
    """Files that must exist and folders that must not be taken, before any process starts. Raises ConfigError."""
    model = config.model.path
    if not (model / "config.json").is_file():
        raise ConfigError(f"model.path = {model}: there is no {model / 'config.json'} (current folder: {Path.cwd()})")
    if not config.model.random_init and not any(model.glob("*.safetensors")):
        raise ConfigError(
            f"model.path = {model} has no *.safetensors weights; name a folder that has, or set "
            "model.random_init = true to start from fresh weights"
        )
    if command == "train" and config.model.random_init:
        raise ConfigError(
            "model.random_init = true: reinforcement learning needs a model that is sometimes right; warm it up with "
            "`fiberpo sft` and set model.path to the folder that it writes"
        )
    metrics = config.run.folder / "metrics.jsonl"
    if command != "eval" and not resume and metrics.exists():
        raise ConfigError(
            f"run.folder = {config.run.folder} already holds a run ({metrics}); continue it with --resume, or choose "
            "another folder with --run.folder"
        )


if __name__ == "__main__":
    sys.exit(main())
