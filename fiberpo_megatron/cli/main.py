"""This module runs `fiberpo train|sft|dump|eval|..`: it checks what can be checked at once and starts the ranks."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import fiberpo_megatron
from fiberpo_megatron.cli import calibrate, certify, doctor, engines, evaluate, plan, profile, replay_step, slurm, watch
from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.printable import printable
from fiberpo_megatron.run_lock import refuse
from fiberpo_megatron.user_warnings import on_console, warnings_to

_OVERRIDES = "further --section.key value pairs override the config, e.g. --parallel.tensor 2"


@warnings_to(on_console)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Errors are one message on stderr."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    try:
        if options.command == "report":
            if overrides:
                parser.error(f"unexpected arguments: {' '.join(overrides)}")
            return _report(options.folder, options.figures)
        if options.command == "profile":
            if overrides:
                parser.error(f"unexpected arguments: {' '.join(overrides)}")
            return profile.run(options)
        if options.command == "watch":
            if overrides:
                parser.error(f"unexpected arguments: {' '.join(overrides)}")
            return watch.run(options)
        if options.command == "engines":
            if overrides:
                parser.error(f"unexpected arguments: {' '.join(overrides)}")
            return engines.run(options)
        if options.command == "replay-step":
            if overrides:
                parser.error(f"unexpected arguments: {' '.join(overrides)}")
            return replay_step.run(options)
        if options.command == "certify":
            return certify.run(options, overrides)
        if options.command == "doctor":
            return doctor.run(options, overrides)
        if options.command == "plan":
            return plan.run(options, overrides)
        if options.command == "calibrate":
            return calibrate.run(options, overrides)
        if options.command == "check-model":
            from fiberpo_megatron.cli.check_model import check_model

            return check_model(options.folder, options.prompt, options.tolerance, overrides)
        if options.command == "slurm":
            return slurm.run_job(options, overrides)
        if options.command == "engine":
            return slurm.run_engine(options, overrides)
        if options.command == "eval" and evaluate.of_a_run(options):
            return evaluate.run(options, overrides)
        return _run(options, overrides)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(printable(f"fiberpo: {error}", keep="\n\t"), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fiberpo", description=fiberpo_megatron.__doc__)
    parser.add_argument("--version", action="version", version=f"fiberpo-megatron {fiberpo_megatron.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("train", "train by reinforcement learning"),
        ("sft", "supervised warm-up with the same policy code"),
        ("dump", "rollouts of trainer.steps steps with the weights of model.path, on disk, for --storage.replay"),
    ):
        command = commands.add_parser(name, help=about, description=f"{about}; {_OVERRIDES}")
        command.add_argument("config", type=Path, metavar="CONFIG.toml")
        command.add_argument("--resume", action="store_true", help="continue where the run stopped")
    evaluate.add_parser(commands, _OVERRIDES)
    doctor.add_parser(commands, _OVERRIDES)
    plan.add_parser(commands, _OVERRIDES)
    calibrate.add_parser(commands, _OVERRIDES)
    check = commands.add_parser(
        "check-model",
        help="compare a model's log-probs with transformers'",
        description=f"compare our log-probs of a prompt with transformers'; {_OVERRIDES}",
    )
    check.add_argument("folder", type=Path, metavar="MODEL_FOLDER")
    check.add_argument("--prompt", help="text to compare on")
    check.add_argument("--tolerance", type=float, default=1e-4, help="largest log-prob difference (default 1e-4)")
    certify.add_parser(commands, _OVERRIDES)
    replay_step.add_parser(commands)
    slurm.add_parsers(commands, _OVERRIDES)
    profile.add_parser(commands)
    watch.add_parser(commands)
    engines.add_parser(commands)
    report = commands.add_parser("report", help="write report.html of a run folder")
    report.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    report.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="write every chart as SVG and CSV into FOLDER instead"
    )
    return parser


def _report(folder: Path, figures: Path | None) -> int:
    from fiberpo_megatron.telemetry.report import write_report
    from fiberpo_megatron.telemetry.report.export import write_figures

    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} does not exist")
    try:
        if figures is not None:
            print(f"{figures}: {len(write_figures(folder, figures))} files")
        else:
            print(write_report(folder))
    except OSError as error:
        raise ValueError(f"the report of {folder} cannot be written: {error}") from error
    return 0


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    overrides = [*overrides, *(["--storage.dump", "true"] if options.command == "dump" else [])]
    config = load_config(options.config, overrides)
    resume = getattr(options, "resume", False)
    flags = ["--resume"] if resume else []
    words = [options.command, str(options.config), *flags, *overrides]
    if "RANK" in os.environ:  # by torchrun or srun: this process is a rank
        from fiberpo_megatron.cli.rank import main as run_rank

        return run_rank(words)
    from fiberpo_megatron.trainer.preflight import preflight  # it needs torch, without which `watch` starts at once

    world_size = local_world_size(config)
    preflight(config, options.command, resume, world_size)
    refuse(config.run.folder)  # rank 0 takes the lock; what can be seen at once should not cost a start
    doctor.warn(config)
    from fiberpo_megatron.launch.local import launch_ranks

    return launch_ranks(
        ["-m", "fiberpo_megatron.cli.rank", *words],
        world_size,
        config.run.folder / "logs",
        {"OMP_NUM_THREADS": str(config.run.threads_per_rank)},
    )


def local_world_size(config: Config) -> int:
    """Return the number of ranks to start on this machine: the layout's. With the data-parallel size left open there
    are as many replicas as the GPUs hold beside the engines."""
    import torch

    parallel, engine = config.parallel, config.rollout.engine
    gpus = torch.cuda.device_count()
    serving = 0 if engine.urls or engine.colocated else engine.count * engine.tensor
    replicas = (gpus - serving) // parallel.model_ranks
    replicas -= replicas % parallel.smallest_data()  # experts are spread over whole groups of replicas
    return max(parallel.world_size(), replicas * parallel.model_ranks if parallel.data is None else 0)


if __name__ == "__main__":
    sys.exit(main())
