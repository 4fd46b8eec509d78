"""This module times what the trainer's processes do with a trajectory beside passes: scoring, joining, packing."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from fiberpo_megatron.calibration.timing import ROUNDS
from fiberpo_megatron.data.packing import assign_rows, pack, padded_lengths
from fiberpo_megatron.environments import Task, Turn
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.rollout.environments import Environments
from fiberpo_megatron.types import Completion, Prompt, RolloutGroup, Trajectory, WeightSpan, flatten

TRAJECTORIES = 64


def time_scores(configs: Sequence[EnvironmentConfig], folder: Path) -> list[float]:
    """Return, by round, the seconds in which a worker of the first environment scores one response.

    It is empty without an environment, and for one that holds conversations, whose work nothing can stand for.
    """
    if not configs:
        return []
    environments = Environments(configs[:1], folder=folder, rank=0)
    try:
        running = environments.running[0]
        if not (running.description.single_turn and running.description.scores):
            return []
        (task,) = environments.loop.run(running.pool.tasks("train", [0]))
        turn = Turn("0", "stop", (2,))

        async def all_at_once() -> None:
            await asyncio.gather(*(running.pool.score(task, turn, seed=0, sample=i) for i in range(TRAJECTORIES)))

        seconds = []
        for number in range(ROUNDS + 1):
            began = perf_counter()
            environments.loop.run(all_at_once())
            if number:
                seconds.append((perf_counter() - began) / TRAJECTORIES)
        return seconds
    finally:
        environments.close()


def time_trajectories(prompt: int, response: int) -> list[float]:
    """Return, by round, the seconds in which one trajectory becomes part of a batch, crosses between ranks, and is
    packed."""
    ids = tuple(np.random.default_rng(0).integers(0, 50, response).tolist())
    completion = Completion(ids, np.zeros(response, np.float32), "stop", (WeightSpan("0", 0, response),))
    asked = Prompt(0, 0, (1,) * prompt, "", Task("", ""))
    one = Trajectory(asked, completion, "", 0.0, False)
    groups = [RolloutGroup(asked, (one,) * 8)] * (TRAJECTORIES // 8)
    seconds = []
    for number in range(ROUNDS + 1):
        began = perf_counter()
        batch = exchange.decode(exchange.encode(flatten(groups)))
        rows = assign_rows(padded_lengths(batch.lengths, 1), 1, 16 * (prompt + response))
        pack(batch, rows[0], sequence_multiple=1)
        if number:
            seconds.append((perf_counter() - began) / TRAJECTORIES)
    return seconds
