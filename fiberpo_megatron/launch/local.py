"""All ranks of a run on this machine, without torchrun's noise: one message when something fails."""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fiberpo_megatron.rendezvous import store_on

_TAIL_LINES = 15


def launch_ranks(arguments: Sequence[str], world_size: int, log_folder: Path, environment: Mapping[str, str]) -> int:
    """Run `python <arguments>` on `world_size` local ranks with torchrun's environment variables; the exit code.

    The rendezvous store lives in this process, so no port can be lost between choosing and using it. stderr of each
    rank goes to `log_folder`. When a rank fails the others are stopped and its message is printed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its failures are told below
    store = store_on("127.0.0.1")
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": time.strftime("%Y%m%d_%H%M%S"),
        "FIBERPO_LAUNCHER_PID": str(os.getpid()),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # ranks of one machine meet on loopback
        **environment,
    }
    log_folder.mkdir(parents=True, exist_ok=True)
    ranks = range(world_size)
    context = start_processes(
        name="fiberpo",
        entrypoint=sys.executable,
        args={rank: tuple(arguments) for rank in ranks},
        envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
        logs_specs=DefaultLogsSpecs(log_dir=str(log_folder), redirects=Std.ERR),
    )
    try:
        result = context.wait(period=0.2)
    except (SignalException, KeyboardInterrupt) as stop:
        number = getattr(stop, "sigval", signal.SIGINT)
        context.close(number)
        print(f"fiberpo: stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + int(number)
    finally:
        context.close()
    if result is None or not result.is_failed():
        return 0
    print(_explain(result.failures, context.stderrs), file=sys.stderr)
    return 1


def _explain(failures: Mapping[int, ProcessFailure], logs: Mapping[int, str]) -> str:
    """The first failure that is a cause: ranks stopped by us, or that only lost a peer, come last."""

    def order(failure: ProcessFailure) -> tuple[bool, bool, int, int]:
        stopped_by_us = failure.exitcode == -signal.SIGTERM
        lost_a_peer = bool(re.search(r"gloo|NCCL|Connection (reset|closed)|rank \d+ failed", _message(failure)))
        return stopped_by_us, lost_a_peer, failure.timestamp, failure.local_rank

    first = min(failures.values(), key=order)
    log = logs.get(first.local_rank, "")
    lines = [f"fiberpo: rank {first.local_rank}: {_message(first)}"]
    if not _told(first):
        tail = Path(log).read_text(errors="replace").splitlines()[-_TAIL_LINES:] if log else []
        lines += [f"  | {line}" for line in tail]
    return "\n".join([*lines, f"fiberpo: log of that rank: {log}"])


def _told(failure: ProcessFailure) -> bool:
    """Whether the rank wrote its error before it ended."""
    return Path(failure.error_file).is_file()


def _message(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was killed by signal {failure.signal_name()} (pid {failure.pid})"
    if not _told(failure):
        return f"stopped with exit code {failure.exitcode}"
    message = failure.message
    return str(message["message"] if isinstance(message, dict) else message)
