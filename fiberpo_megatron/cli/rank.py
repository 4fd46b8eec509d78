"""This module is one rank of a run, which torchrun, srun or the local launcher starts."""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.engines.addresses import listen_towards_master
from fiberpo_megatron.engines.registry import Registry
from fiberpo_megatron.launch.local import LAUNCHER
from fiberpo_megatron.printable import printable
from fiberpo_megatron.rendezvous import first_ranks_text, ranks_store
from fiberpo_megatron.subprocesses import set_gpu_variables
from fiberpo_megatron.trainer.stop import Stopped, StoppedByAlarm, StopRequest, leave
from fiberpo_megatron.types import EXIT_ALARM, EXIT_STOPPED
from fiberpo_megatron.user_warnings import nowhere, on_console, warnings_to

CONFIG_TIMEOUT = timedelta(minutes=10)
"""Time for rank 0 to start and read the config; the run's own timeout is a setting in it."""


def main(arguments: Sequence[str]) -> int:
    """Run `train|sft|dump|eval CONFIG.toml [--resume] [--registry FOLDER] [--section.key value ...]` on this rank.

    Returns the exit code.

    `--registry`: where the job's engines register (engines/registry.py). `follow` evaluates checkpoints of the run in
    the folder `--of`: all that come, those that exist (`--once`), or one (`--step`).

    An error is written where the launcher reads it, with its traceback on stderr; under torchrun or srun its message
    is also the last line on stderr. SIGUSR1, and SIGTERM from anybody but the local launcher, ask the run to save and
    stop (exit code EXIT_STOPPED); an alarm with `action = "stop"` does the same with the exit code EXIT_ALARM.
    """
    die_with_launcher()
    set_gpu_variables(os.environ)
    stop = StopRequest()
    stop.listen(signal.SIGUSR1, *(() if LAUNCHER in os.environ else (signal.SIGTERM,)))
    get_error_handler().initialize()
    try:
        _run(list(arguments), stop)
    except Stopped as stopped:
        by_alarm = isinstance(stopped, StoppedByAlarm)
        if os.environ.get("RANK", "0") == "0":
            print(printable(f"fiberpo: {stopped}", keep="\n"), file=sys.stderr, flush=True)
            if by_alarm:
                get_error_handler().record_exception(stopped)  # the launcher reads it
        return EXIT_ALARM if by_alarm else EXIT_STOPPED
    except Exception as error:
        leave(error)
    return 0


def _run(arguments: list[str], stop: StopRequest) -> None:
    command, path, *rest = arguments
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--resume", action="store_true")
    flags.add_argument("--registry", type=Path)
    flags.add_argument("--of", type=Path)
    flags.add_argument("--once", action="store_true")
    flags.add_argument("--step", type=int)
    options, overrides = flags.parse_known_args(rest)
    resume, registry = options.resume, options.registry and Registry(options.registry)
    with warnings_to(nowhere if LAUNCHER in os.environ else on_console):  # the launcher has read it and given them
        config = shared_config(path, overrides)
    if LAUNCHER not in os.environ and "RANK" in os.environ:
        _begin(config, command, resume)
    if command == "check-model":
        from fiberpo_megatron.trainer.model_check import compare

        compare(config)
        return
    from fiberpo_megatron.trainer.run import Run  # imports torch and Megatron: after the cheap checks

    if command == "follow":
        from fiberpo_megatron.trainer.follow import follow

        with Run.from_config(config, command="eval", stop=stop, checked=True) as run:
            follow(run, options.of, once=options.once, step=options.step, stop=stop)
        return
    parts: dict[str, Any] = {"command": command, "resume": resume, "stop": stop, "registry": registry}
    with Run.from_config(config, **parts, checked=True) as run:  # by `fiberpo`, or in `_begin`
        {"train": run.train, "sft": run.fine_tune, "dump": run.dump, "eval": run.evaluate}[command]()


def shared_config(path: str | Path, overrides: Sequence[str]) -> Config:
    """Return the config that rank 0 reads: a thousand ranks need not read the file, and all have the same settings."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return load_config(path, overrides)
    listen_towards_master()
    text = first_ranks_text("the config", lambda: load_config(path, overrides).model_dump_json(), CONFIG_TIMEOUT)
    return Config.model_validate_json(text)


def _begin(config: Config, command: str, resume: bool) -> None:
    """Under torchrun or srun: what `fiberpo` checks before it starts ranks itself, and whether all ranks are there."""
    from fiberpo_megatron.cli import doctor
    from fiberpo_megatron.trainer.preflight import preflight  # not what ranks of the local launcher should wait for

    ranks_store(timedelta(seconds=config.run.distributed_timeout_s))
    if os.environ["RANK"] == "0":
        preflight(config, command, resume, int(os.environ["WORLD_SIZE"]))
    doctor.warn(config)


def die_with_launcher() -> None:
    """Ask the kernel to end this process when the local launcher dies, kill -9 included."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG; a stopped rank takes no SIGTERM
    if os.getppid() != int(launcher):  # it died before the request was in place
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
