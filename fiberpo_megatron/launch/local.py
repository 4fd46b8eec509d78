"""This module starts all ranks of a run on this machine, and prints one message when something fails.

torchrun would print much more.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fiberpo_megatron.launch.failures import lost_a_peer, quoted, shown
from fiberpo_megatron.rendezvous import store_on
from fiberpo_megatron.subprocesses import exit_text
from fiberpo_megatron.types import EXIT_ALARM, EXIT_STOPPED

LAUNCHER = "FIBERPO_LAUNCHER_PID"
"""Environment variable by which a rank recognises this launcher; its value is the launcher's process id."""


def launch_ranks(arguments: Sequence[str], world_size: int, log_folder: Path, environment: Mapping[str, str]) -> int:
    """Run `python <arguments>` on `world_size` local ranks with torchrun's environment variables; return the exit code.

    The rendezvous store lives in this process, so no port can be lost between choosing and using it. stderr of each
    rank goes to `log_folder`. When a rank fails the others are stopped and its message is printed.

    SIGUSR1 and a first SIGTERM reach the ranks as SIGUSR1, a request to save and stop; their exit code is then
    returned. SIGINT and a second SIGTERM stop them at once.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `_explain` reports the failures
    store = store_on("127.0.0.1")
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": time.strftime("%Y%m%d_%H%M%S"),
        LAUNCHER: str(os.getpid()),
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
    asked = _pass_on(context.pids())
    try:
        result = context.wait(period=0.2)
    except (SignalException, KeyboardInterrupt) as stop:
        number = getattr(stop, "sigval", signal.SIGINT)
        context.close(signal.SIGKILL if asked else number)
        print(f"fiberpo: stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + int(number)
    finally:
        context.close()
    if result is None or not result.is_failed():
        return 0
    codes = {failure.exitcode for failure in result.failures.values()} - {-signal.SIGTERM}
    if codes == {EXIT_ALARM}:
        print(f"fiberpo: {shown(_alarm(result.failures))}", file=sys.stderr)
        return EXIT_ALARM
    if asked:
        codes = {failure.exitcode for failure in result.failures.values()}
        stopped = codes - {-signal.SIGTERM, -signal.SIGUSR1}  # the other ranks were stopped because one failed
        if stopped <= {EXIT_STOPPED}:
            print(f"fiberpo: stopped by {asked[0].name}", file=sys.stderr)
            return EXIT_STOPPED if stopped else 128 + asked[0]
    print(_explain(result.failures, context.stderrs), file=sys.stderr)
    return 1


def _pass_on(pids: Mapping[int, int]) -> list[signal.Signals]:
    """Send requests to stop on to the ranks from now on; the list fills with the signals that came."""
    came: list[signal.Signals] = []
    at_once = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGTERM and callable(at_once):
            at_once(number, frame)
        came.append(signal.Signals(number))
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    return came


def _explain(failures: Mapping[int, ProcessFailure], logs: Mapping[int, str]) -> str:
    """Describe the first failure that is a cause; ranks that this launcher stopped, or that only lost a peer, come
    last."""

    def order(failure: ProcessFailure) -> tuple[bool, bool, int, int]:
        stopped_by_us = failure.exitcode == -signal.SIGTERM
        return stopped_by_us, lost_a_peer(_message(failure)), failure.timestamp, failure.local_rank

    first = min(failures.values(), key=order)
    log = logs.get(first.local_rank, "")
    lines = [f"fiberpo: rank {first.local_rank}: {shown(_message(first))}"]
    if not _wrote_error(first) and log:
        lines += quoted(Path(log))
    return "\n".join([*lines, f"fiberpo: log of that rank: {log}"])


def _alarm(failures: Mapping[int, ProcessFailure]) -> str:
    """Return the words of the alarm that stopped the run, which rank 0 has written."""
    written = [failure for failure in failures.values() if _wrote_error(failure)]
    return _message(written[0]) if written else "stopped by an alarm, after saving: see the console and alarms.jsonl"


def _wrote_error(failure: ProcessFailure) -> bool:
    """Return whether the rank wrote its error before it ended."""
    return Path(failure.error_file).is_file()


def _message(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was killed by {exit_text(failure.exitcode)} (pid {failure.pid})"
    if not _wrote_error(failure):
        return f"stopped with {exit_text(failure.exitcode)}"
    message = failure.message
    return str(message["message"] if isinstance(message, dict) else message)
