"""This module runs a function on several processes of this machine, which form a layout, with a deadline for all.

    values = run_ranks(2, worker, argument)          # one return value per rank
    outcomes = collect_ranks(2, worker, argument)    # the same, but exceptions are kept as text

`worker` is a function of a module. It runs in processes that see the variables of torchrun (RANK, WORLD_SIZE,
MASTER_ADDR, ...). They are forked from a server that has imported torch and Megatron-Core once, which makes a start
cheap. Function, arguments and results are pickled, and travel over pipes that only this process and its children hold.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from fiberpo_megatron.rendezvous import store_on

DEADLINE_S = 600.0
"""Seconds that the processes of one layout get altogether, if the caller does not say."""
_GRACE_S = 10.0
"""Seconds that the others get to report after one has failed: its error may be the consequence of another's."""


@dataclass(frozen=True)
class Outcome:
    """Holds what one rank returned, or the exception that it raised."""

    rank: int
    value: Any = None
    error: str | None = None
    """`TypeName: message`; None when the rank returned."""
    trace: str = ""


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

    `on_cpu` hides the GPUs from them. Raises RanksFailed with the traceback of every rank that failed.
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fiberpo_megatron.mcore.preload"])
    store = store_on("127.0.0.1")
    call = pickle.dumps((function, arguments))
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, world_size, store.port, on_cpu, call, theirs), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Outcome]:
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
                outcomes[rank] = Outcome(rank, error="the process died silently (killed, or crashed in native code)")
            if outcomes[rank].error is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    late = f"still running when its time was over ({timeout_s:.0f} s, less once another rank has failed)"
    return [outcomes.get(rank, Outcome(rank, error=late)) for rank in range(len(pipes))]


def _rank(rank: int, world_size: int, port: int, on_cpu: bool, call: bytes, pipe: Connection) -> None:
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
    try:
        function, arguments = pickle.loads(call)
        message = pickle.dumps(Outcome(rank, value=function(*arguments)))
    except BaseException as error:  # the parent raises it
        text = f"{type(error).__name__}: {error}"
        message = pickle.dumps(Outcome(rank, error=text, trace=traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    os._exit(0)  # no interpreter shutdown: a process group that waits for a failed rank would hold it
