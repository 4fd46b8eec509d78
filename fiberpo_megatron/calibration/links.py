"""This module times collectives among the ranks at hand: NCCL on GPUs, gloo without."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fiberpo_megatron.calibration.timing import timed

SIZES = {"cpu": (4 * 2**10, 2**20, 8 * 2**20), "cuda": (4 * 2**10, 2**20, 256 * 2**20)}
"""Bytes of a rank's message: the smallest shows the latency, the largest the bandwidth."""


@dataclass(frozen=True)
class LinkTimes:
    """Holds the seconds of one collective at one size, one number per round."""

    operation: str
    bytes: int
    """Bytes that each rank sends."""
    seconds: list[float]


def time_links(device: torch.device) -> list[LinkTimes]:
    """Return the times of all-reduce, all-gather, all-to-all and a message to the next rank; every rank calls this.

    One rank alone has no links, and gets nothing.
    """
    ranks = dist.get_world_size()
    if ranks == 1:
        return []
    share = (ranks - 1) / ranks
    works: dict[tuple[str, int], Callable[[], object]] = {}
    for size in SIZES[device.type]:
        count = size // 4 // ranks * ranks
        mine, other = torch.ones(count, device=device), torch.ones(count, device=device)
        part = torch.ones(count // ranks, device=device)
        works |= {
            ("all_reduce", int(8 * share * count)): partial(dist.all_reduce, mine),
            ("all_gather", int(4 * share * count)): partial(dist.all_gather_into_tensor, other, part),
            ("all_to_all", int(4 * share * count)): partial(dist.all_to_all_single, other, mine),
            ("next_rank", 4 * count): partial(_pass_on, mine, other),
        }
    found = timed(works, device, dist.barrier)
    return [LinkTimes(name, size, seconds) for (name, size), seconds in found.items()]


def _pass_on(mine: Tensor, other: Tensor) -> None:
    """Send to the next rank and receive from the one before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    send = dist.P2POp(dist.isend, mine, (rank + 1) % ranks)
    receive = dist.P2POp(dist.irecv, other, (rank - 1) % ranks)
    for request in dist.batch_isend_irecv([send, receive]):
        request.wait()


def on_one_machine() -> bool:
    """Return whether the launcher started all ranks on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
