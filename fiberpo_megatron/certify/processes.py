"""This module runs a function on several processes of this machine, which form a layout, with a deadline for all.

    values = run_ranks(2, worker, argument)          # one return value per rank
    outcomes = collect_ranks(2, worker, argument)    # the same, but exceptions are kept as text

`worker` is a function of a module. It runs in processes that see the variables of torchrun (RANK, WORLD_SIZE,
MASTER_ADDR, ...). Without GPUs they are forked from a server that has imported torch and Megatron-Core once, which
makes a start cheap. Ranks on GPUs are started afresh, because CUDA does not work in a process that was forked from one
in which it had begun. Function, arguments and results are pickled, and travel over pipes that only this process and its
children hold.
"""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fiberpo_megatron.rendezvous import store_on
from fiberpo_megatron.subprocesses import exit_text

DEADLINE_S = 600.0
"""Seconds that the processes of one layout get altogether, if the caller does not say."""
_GRACE_S = 10.0
"""Seconds that the others get to report after one has failed: its error may be the consequence of another's."""
_EXIT_S = 5.0
"""Seconds that the system gets to say how a process ended whose pipe is closed."""


@dataclass(frozen=True)
class Outcome:
    """Holds what one rank returned, or the exception that it raised."""

    rank: int
    value: Any = None
    error: str | None = None
    """`TypeName: message`; None when the rank returned."""
    trace: str = ""


def too_few_gpus(world_size: int) -> bool:
    """Return whether there are GPUs, but not one for each rank. NCCL refuses two ranks on one, so that so many ranks
    have to run on the CPU."""
    return torch.cuda.is_available() and torch.cuda.device_count() < world_size


class RanksFailed(RuntimeError):
    """At least one rank raised, died or was still running at the deadline; the message holds every traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = DEADLINE_S,
    on_cpu: bool = False,
) -> list[Any]:
    """Return what `function(*arguments)` returned on each of `world_size` ranks, in rank order.

    `on_cpu` hides the GPUs from them. On GPUs, products of float32 are made in float32, not in TF32, unless the
    environment already has NVIDIA_TF32_OVERRIDE. Raises RanksFailed with the traceback of every rank that failed.
    """
    outcomes = collect_ranks(world_size, function, *arguments, timeout_s=timeout_s, on_cpu=on_cpu)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise RanksFailed(
            "\n".join(f"rank {one.rank} of {world_size} failed: {one.error}\n{one.trace}" for one in failed)
        )
    return [outcome.value for outcome in outcomes]


def collect_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = DEADLINE_S,
    on_cpu: bool = False,
) -> list[Outcome]:
    """Do as `run_ranks`, but return failures. The outcome of a rank that is killed at the deadline says so."""
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # before the server of the forks imports Megatron
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = _context(on_cpu)
    # Transformer Engine lets cuBLAS round factors of float32 to TF32's 10 bits; CUDA reads the variable as it starts.
    variables = {} if on_cpu else {"NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "0")}
    store = store_on("127.0.0.1")
    call = pickle.dumps((function, arguments))
    processes: list[BaseProcess] = []
    pipes = []
    crashes = tempfile.TemporaryDirectory(prefix="fiberpo-ranks-")
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            crash = Path(crashes.name) / str(rank)
            process = context.Process(
                target=_rank, args=(rank, world_size, store.port, on_cpu, call, theirs, crash), daemon=True
            )
            with _environment(**variables):
                process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(pipes, processes, Path(crashes.name), timeout_s)
    finally:
        for process in processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()
        crashes.cleanup()


def _context(on_cpu: bool) -> Any:
    """Return how processes start; the server that forks them sees no GPUs, so that its platform is the CPU's."""
    if torch.cuda.is_available() and not on_cpu:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fiberpo_megatron.mcore.preload"])
    with _environment(CUDA_VISIBLE_DEVICES=""):
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables for the processes that are started inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _collect(pipes: list[Connection], processes: list[BaseProcess], crashes: Path, timeout_s: float) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + timeout_s
    while len(outcomes) < len(pipes) and time.monotonic() < deadline:
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
        for pipe in wait(pending, timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[rank] = Outcome(rank, error=_end_of(processes[rank]), trace=_read(crashes / str(rank)))
            if outcomes[rank].error is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    late = f"still running when its time was over ({timeout_s:.0f} s, less once another rank has failed)"
    return [outcomes.get(rank, Outcome(rank, error=late)) for rank in range(len(pipes))]


def _end_of(process: BaseProcess) -> str:
    """Return in words how a process ended that has reported nothing."""
    process.join(timeout=_EXIT_S)
    code = process.exitcode
    if code is None:
        return f"the process closed its pipe without a report and still runs {_EXIT_S:.0f} s later"
    hint = " (killed, or crashed in native code)" if code < 0 else ""
    return f"the process ended with {exit_text(code)}{hint} without a report"


def _read(crash: Path) -> str:
    """Return the Python stacks that the process wrote while it crashed; nothing if it was killed."""
    return crash.read_text(errors="replace") if crash.exists() else ""


def _rank(rank: int, world_size: int, port: int, on_cpu: bool, call: bytes, pipe: Connection, crash: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent holds the store, so no port is ever guessed
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
    )
    faulthandler.enable(crash.open("w"))  # the open file lives as long as the process: faulthandler holds it
    try:
        function, arguments = pickle.loads(call)
        message = pickle.dumps(Outcome(rank, value=function(*arguments)))
    except BaseException as error:  # the parent raises it
        text = f"{type(error).__name__}: {error}"
        message = pickle.dumps(Outcome(rank, error=text, trace=traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    os._exit(0)  # no interpreter shutdown: a process group that waits for a failed rank would hold it
