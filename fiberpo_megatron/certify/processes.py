"""This module runs a function on several processes of this machine, which form a layout, with a deadline for all."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fiberpo_megatron.rendezvous import store_on

DEADLINE_S = 600.0
"""Seconds that the processes of one layout get altogether."""
_GRACE_S = 15.0
"""Seconds that the others get to report after one has failed: its error may be the consequence of another's."""


class RankFailed(RuntimeError):
    """A process of a layout failed, died or was still running at the deadline; the message names it and the cause."""


def run_processes(size: int, function: Callable[..., Any], *arguments: Any, on_cpu: bool = False) -> list[Any]:
    """Return what `function(*arguments)` returned on each of `size` processes, in rank order.

    The function, its arguments and what it returns are pickled. The processes see the variables of torchrun (RANK,
    WORLD_SIZE, ...). `on_cpu` hides the GPUs from them. Raises RankFailed.
    """
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # before Megatron is imported, by the server of the forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fiberpo_megatron.mcore.preload"])
    store = store_on("127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="fiberpo-certify-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        processes = [
            context.Process(target=_run, args=(folder, rank, size, store.port, on_cpu), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [_outcome(folder / str(rank), rank, size, processes[rank].exitcode) for rank in range(size)]


def _wait(processes: list[Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)


def _outcome(path: Path, rank: int, size: int, code: int | None) -> Any:
    if not path.is_file():
        raise RankFailed(f"rank {rank} of {size} died or did not end within {DEADLINE_S:.0f} s (exit code {code})")
    value, error = pickle.loads(path.read_bytes())
    if error is not None:
        raise RankFailed(f"rank {rank} of {size} failed:\n{error}")
    return value


def _run(folder: Path, rank: int, size: int, port: int, on_cpu: bool) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # this machine's certify holds the store, so no port is guessed
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
    )
    value, error = None, None
    try:
        import torch

        torch.set_num_threads(1)
        function, arguments = pickle.loads((folder / "call").read_bytes())
        value = function(*arguments)
    except BaseException:  # the parent raises it
        error = traceback.format_exc()
    partial = folder / f".{rank}"
    partial.write_bytes(pickle.dumps((value, error)))
    partial.rename(folder / str(rank))
    os._exit(1 if error is not None else 0)  # no shutdown, in which a process group would wait for a failed rank
