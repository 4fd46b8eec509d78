"""This module makes the random numbers of a worker's job depend on its seed alone, however jobs take turns."""

from __future__ import annotations

import random
import sys
from typing import Any

from fiberpo_megatron.environments.worker_jobs import Job


class RandomStates:
    """Gives every job random numbers that depend on its seed alone, however jobs take turns."""

    def __init__(self) -> None:
        self._owner: Job | None = None

    def switch(self, job: Job) -> None:
        """Make the generators those of `job`: seeded when it comes for the first time."""
        if self._owner is job:
            return
        if self._owner is not None:
            self._owner.random_state = _random_state()
        if job.random_state is None:
            _seed_random(job.seed)
        else:
            _set_random_state(job.random_state)
        self._owner = job

    def forget(self, job: Job) -> None:
        """Keep no state of a job that has ended."""
        if self._owner is job:
            self._owner = None


def _loaded() -> tuple[Any, Any]:
    """Return numpy.random and torch where the user's code has imported them, else None."""
    return sys.modules.get("numpy.random"), sys.modules.get("torch")


def _seed_random(seed: int) -> None:
    random.seed(seed)
    numpy_random, torch = _loaded()
    if numpy_random is not None:
        numpy_random.seed(seed % 2**32)
    if torch is not None:
        torch.default_generator.manual_seed(seed % 2**63)


def _random_state() -> tuple[Any, ...]:
    numpy_random, torch = _loaded()
    return (
        random.getstate(),
        None if numpy_random is None else numpy_random.get_state(),
        None if torch is None else torch.default_generator.get_state(),
    )


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    numpy_random, torch = _loaded()
    if numpy_random is not None and state[1] is not None:
        numpy_random.set_state(state[1])
    if torch is not None and state[2] is not None:
        torch.default_generator.set_state(state[2])
