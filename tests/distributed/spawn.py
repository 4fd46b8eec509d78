"""Run a function on several gloo ranks, with a deadline, and leave nothing behind.

    values = run_ranks(2, worker, argument)          # one return value per rank
    outcomes = collect_ranks(2, worker, argument)    # the same, exceptions kept as text

`worker` is a module-level function; it runs in processes that see the launcher's environment variables (RANK,
WORLD_SIZE, MASTER_ADDR, ...) as under torchrun. Processes are forked from a server that has imported torch and
Megatron-Core once, so that a spawn costs little.
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

from torch.distributed import TCPStore

_GRACE_S = 10.0
"""Seconds that the other ranks get to report after one has failed."""

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["fiberpo_megatron.mcore.preload"])


@dataclass(frozen=True)
class Outcome:
    """What one rank returned, or the exception that it raised."""

    rank: int
    value: Any = None
    error: str | None = None
    """`TypeName: message`; None when the rank returned."""
    trace: str = ""


class RanksFailed(RuntimeError):
    """At least one rank raised, died or was still running at the deadline."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`function(*args)` on `world_size` ranks; their return values in rank order.

    Raises RanksFailed with every failed rank's traceback.
    """
    outcomes = collect_ranks(world_size, function, *args, timeout_s=timeout_s)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise RanksFailed("\n".join(f"rank {o.rank}: {o.error}\n{o.trace}" for o in failed))
    return [outcome.value for outcome in outcomes]


def collect_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Outcome]:
    """As `run_ranks`, but failures are returned. A rank that is killed at the deadline says so."""
    store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    payload = pickle.dumps((function, args))
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            arguments = (rank, world_size, store.port, payload, theirs)
            process = _context.Process(target=_child, args=arguments, daemon=True)
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
                outcomes[rank] = Outcome(rank, error="died without a word (killed, or crashed in native code)")
            if outcomes[rank].error is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    late = f"still running when its time was over ({timeout_s:.0f} s, less once another rank has failed)"
    return [outcomes.get(rank, Outcome(rank, error=late)) for rank in range(len(pipes))]


def _child(rank: int, world_size: int, port: int, payload: bytes, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent holds the store, so no port is ever guessed
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        function, args = pickle.loads(payload)
        outcome = Outcome(rank, value=function(*args))
        message = pickle.dumps(outcome)
    except BaseException as error:  # reported to the parent, which raises it
        text = f"{type(error).__name__}: {error}"
        message = pickle.dumps(Outcome(rank, error=text, trace=traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    os._exit(0)  # no interpreter shutdown: a process group that waits for a failed rank would hold it
