"""These tests run trajectories on a virtual clock: a batch takes as long as the slowest, whatever the others do.

Only the servers, the environment and the scorer take time there, so that every time below is exact up to rounding.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.engines.client import Sampling
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.environments import Conversation, Environment, Outcome, Task
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.simulation.clock import VirtualLoop
from fiberpo_megatron.types import RolloutGroup, Trajectory
from tests.engines.fake_server import Answer, FakeServers
from tests.rollout.test_generator import PROMPTS, never
from tests.rollout.test_segments import ENGINES, Drawing
from tests.trainer.toy import Words, generator

TOKEN_S, TOOL_S, SCORE_S = 0.1, 0.7, 0.3
SAMPLES = 4


class Servers(FakeServers):
    """Each token takes its time; responses have 1 to 40 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.drawing = Drawing()
        self.seconds = 0.0
        """What all requests together have taken."""

    async def _usual(self, host: str, path: str, body: Any) -> Answer:
        if path != "/generate":
            return await super()._usual(host, path, body)
        answers = self.drawing.draw(host, body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        seconds = TOKEN_S * max(len(answer["output_ids"]) for answer in answers)
        await asyncio.sleep(seconds)
        self.seconds += seconds
        self.running -= 1
        return answers


class Tools(Environment):
    """It talks for 1 to 4 turns, and works after each. Its metrics say how long each turn takes with its sampling."""

    train_size = 10**6

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        turns: dict[str, float] = {}
        last = 1
        while len(turns) < 4 and last % 2:
            turn = await policy.say(task.prompt)
            last = turn.token_ids[-1]
            tool_s = TOOL_S * (last % 5)
            await asyncio.sleep(tool_s)
            turns[f"turn {len(turns)}"] = TOKEN_S * len(turn.token_ids) + tool_s
        return Outcome(1.0, metrics=turns)


class Teacher:
    async def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        await asyncio.sleep(SCORE_S)
        return np.zeros(len(response), np.float32)


@dataclass
class Sampled:
    groups: dict[int, RolloutGroup]
    ended: dict[int, float]
    """When each group had ended (virtual s)."""
    seconds: float
    servers: Servers

    @property
    def trajectories(self) -> list[Trajectory]:
        return [one for group in self.groups.values() for one in group.trajectories]


def sampled(segment_tokens: int | None = None, max_concurrent: int = 64) -> Sampled:
    loop, servers = VirtualLoop(0.0, lambda: None), Servers()
    with EnginePool(ENGINES, timeout_s=3600, transport=servers, loop=loop) as pool:
        sampler = EngineSampler(
            pool, Sampling(40), max_concurrent=max_concurrent, vocabulary=32, segment_tokens=segment_tokens
        )
        found = generator(sampler, Tools(), encoder=Words((7,)))
        found = replace(found, loop=loop, scorers={"teacher_log_probs": Teacher()})
        groups, ended = {}, {}
        for index, group in found.groups(PROMPTS, SAMPLES, "7", never):
            groups[index], ended[index] = group, loop.time()
        return Sampled(groups, ended, loop.time(), servers)


def alone_s(trajectory: Trajectory) -> float:
    """Return how long a trajectory takes that nothing holds up."""
    return sum(trajectory.metrics.values()) + SCORE_S


@pytest.mark.parametrize("segment_tokens", [None, 3])
def test_a_batch_takes_as_long_as_its_slowest_trajectory(segment_tokens: int | None):
    found = sampled(segment_tokens)
    alone = [alone_s(one) for one in found.trajectories]
    assert len(alone) == len(PROMPTS) * SAMPLES and found.servers.most_running > len(alone) / 2
    assert found.seconds == pytest.approx(max(alone))
    assert sum(alone) > 10 * max(alone), "one after the other would take much longer"
    turns = [f"turn {n}" for n in range(4)]
    barrier = sum(max(one.metrics.get(turn, 0.0) for one in found.trajectories) for turn in turns)
    assert barrier > 1.2 * max(alone), "so would turns that wait for each other"


def test_a_group_has_ended_with_its_own_slowest_trajectory():
    found = sampled()
    for index, group in found.groups.items():
        assert found.ended[index] == pytest.approx(max(map(alone_s, group.trajectories)))
    assert list(found.ended.values()) == sorted(found.ended.values()) and list(found.ended) != sorted(found.ended)


def test_where_requests_wait_for_a_slot_tools_work_beside_them():
    """With one request at a time the sampling adds up, and nothing else does."""
    found = sampled(max_concurrent=1)
    sampling, alone = found.servers.seconds, [alone_s(one) for one in found.trajectories]
    assert found.servers.most_running == 1
    assert sampling < found.seconds < sampling + max(alone) < 0.9 * sum(alone)
