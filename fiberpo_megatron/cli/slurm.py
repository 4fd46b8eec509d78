"""This module runs `fiberpo slurm`, which makes a job for a cluster, and `fiberpo engine`, which the job runs on each
machine with engines."""

import argparse
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import load_config


def add_parsers(commands: "argparse._SubParsersAction[Any]", about_overrides: str) -> None:
    """Add the arguments of both commands."""
    job = commands.add_parser(
        "slurm", help="write and submit a SLURM job", description=f"write a SLURM job; {about_overrides}"
    )
    job.add_argument("config", type=Path, metavar="CONFIG.toml")
    job.add_argument("--resume", action="store_true", help="go on with the run in run.folder")
    what = job.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the script, write nothing")
    what.add_argument("--submit", action="store_true", help="hand the script to sbatch")
    engine = commands.add_parser("engine", help="run the engines of one machine of a job")
    engine.add_argument("config", type=Path, metavar="CONFIG.toml")
    engine.add_argument("--registry", type=Path, required=True, help="folder of the job in which engines register")
    engine.add_argument("--host", required=True, help="this machine's name in the registry")
    engine.add_argument("--clients", required=True, help="addresses that use the engines, comma-separated")
    engine.add_argument("--first-gpu", type=int, default=0, help="index of the first GPU to use")


def run_job(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run `fiberpo slurm` and return the exit code."""
    from fiberpo_megatron.launch.slurm import render, shape_of, submit, write_job

    config = load_config(options.config, overrides)
    if options.dry_run:
        print(render(config, config.run.folder / "slurm" / "config.toml", Path.cwd()), end="")
        return 0
    from fiberpo_megatron.trainer.preflight import preflight

    preflight(config, "train", options.resume, shape_of(config).ranks, here=False)
    script = write_job(config, options.resume)
    if not options.submit:
        print(f"Script: {script}\nSubmit it with: sbatch {script}")
        return 0
    for job in submit(script, config.slurm.chain):
        log = f"{job}_<index>.log" if config.slurm.array else f"{job}.log"
        print(f"Submitted job {job}; log: {config.run.folder / 'slurm'}/{log}")
    return 0


def run_engine(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run `fiberpo engine` and return the exit code."""
    from fiberpo_megatron.launch.engine_host import serve

    config = load_config(options.config, overrides)
    return serve(config, options.registry, options.host, options.clients.split(","), options.first_gpu)
