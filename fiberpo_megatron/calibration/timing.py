"""This module times several pieces of work in turns, on one process or on all ranks together."""

from collections.abc import Callable, Hashable, Mapping
from time import perf_counter
from typing import TypeVar

import torch

ROUNDS = 5
"""Rounds of every timing; one more comes first and is not counted."""
Name = TypeVar("Name", bound=Hashable)


def timed(
    works: Mapping[Name, Callable[[], object]],
    device: torch.device,
    together: Callable[[], object] = lambda: None,
    rounds: int = ROUNDS,
) -> dict[Name, list[float]]:
    """Return the seconds of each round by name. A round does every piece of work once, so that a machine which is
    slower for a while is slower for all of them. `together` is called before each piece, to let all ranks begin at
    once."""
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            together()
            _finish(device)
            began = perf_counter()
            work()
            _finish(device)
            if number:
                seconds[name].append(perf_counter() - began)
    return seconds


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
