"""Who hangs is named: a stopped process by its neighbour, a hanging program by those that wait for it."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.parallel.heartbeat import heartbeat

PATIENCE_S = 3.0


def stop_self(seconds: float) -> None:
    """SIGSTOP, ended by somebody else."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def watched(stopped: list[int], seconds: float) -> list[str]:
    """The errors with which this rank would have left while the ranks `stopped` stand still for `seconds`."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    told: list[str] = []

    def leave(error: Exception) -> NoReturn:
        told.append(f"{type(error).__name__}: {error}")
        sys.exit()  # of the thread

    dist.init_process_group("gloo")
    with heartbeat(rank, size, PATIENCE_S, lambda: ("train", 7.0), leave):
        dist.barrier()  # everybody has been seen
        if rank in stopped:
            stop_self(seconds)
        else:
            time.sleep(seconds)
        dist.barrier()
        time.sleep(1)
    return told


def test_a_stopped_rank_is_named_by_its_neighbour_alone() -> None:
    first, second, third = run_ranks(3, watched, [1], 2 * PATIENCE_S)
    assert second == []
    assert all("rank 0 (" in message for message in third)  # whose thread ended when it had named rank 1
    [message] = first
    assert message.startswith("RankSilent: rank 1 (") and "no sign of life for" in message
    assert "run.heartbeat_timeout_s = 3" in message and "its phase was 'train', for 7 s" in message


def test_a_job_that_was_suspended_as_a_whole_goes_on() -> None:
    assert run_ranks(2, watched, [0, 1], 2 * PATIENCE_S) == [[], []]


def wait_for_a_hanging_rank() -> str:
    """Rank 1 is in no collective; the others' times out."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    phase = "generate" if rank == 1 else "train"
    try:
        with heartbeat(rank, size, 20.0, lambda: (phase, 612.0), leave=sys.exit):
            dist.barrier()
            if rank == 1:
                time.sleep(6)
            else:
                dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_timeout_tells_what_every_rank_is_doing() -> None:
    message, hanging = run_ranks(2, wait_for_a_hanging_rank)
    assert hanging == ""
    assert "imed out" in message or "imeout" in message
    assert "rank 0 (" in message and "train for 612 s" in message
    assert "rank 1 (" in message and "generate for 612 s, said" in message
