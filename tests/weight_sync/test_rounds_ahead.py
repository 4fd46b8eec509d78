"""The next round is prepared while one travels, in each way that loads in rounds."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.weight_sync.base import PublisherContext
from fiberpo_megatron.weight_sync.disk import DiskPublisher
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher
from fiberpo_megatron.weight_sync.ipc import IpcPublisher
from fiberpo_megatron.weight_sync.rounds import RoundPublisher
from tests.weight_sync.sources import Tensors, context
from tests.weight_sync.test_publishing import ENGINES, WEIGHTS, JoiningServers, model  # noqa: F401 - a fixture

LOADS = {"/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_distributed"}
PATIENCE_S = 5.0
WAYS: dict[str, Callable[[PublisherContext], RoundPublisher]] = {
    "disk": DiskPublisher,
    "ipc": IpcPublisher,
    "distributed": lambda given: DistributedPublisher(given, backend="gloo"),
}


class Announced(Tensors):
    """Weights that say which rounds have been asked for."""

    def __init__(self, rounds: int) -> None:
        super().__init__(WEIGHTS.items())
        self.asked = [threading.Event() for _ in range(rounds)]

    def share(self, limit):
        for event, tensors in zip(self.asked, super().share(limit), strict=True):
            event.set()
            yield tensors


class Patient(JoiningServers):
    """Servers that load a round only when the trainer has begun to prepare the next one."""

    def __init__(self, weights: Announced, questions: int) -> None:
        super().__init__()
        self.weights = weights
        self.begun = dict.fromkeys([engine.url.removeprefix("http://") for engine in ENGINES], -questions)
        """How many rounds each has begun to load; `questions` requests before them hold no weights."""
        self.waited: list[bool] = []

    async def _usual(self, host, path, body):
        if path in LOADS:
            self.begun[host] += 1
            following = self.begun[host]
            if 0 < following < len(self.weights.asked):
                self.waited.append(await asyncio.to_thread(self.weights.asked[following].wait, PATIENCE_S))
        return await super()._usual(host, path, body)


@pytest.mark.parametrize("way", WAYS)
def test_the_next_round_is_prepared_while_one_is_loaded(way: str, model: Path, tmp_path: Path):  # noqa: F811
    weights = Announced(rounds=4)
    servers = Patient(weights, questions=1 if way == "ipc" else 0)
    with EnginePool(ENGINES, timeout_s=30, transport=servers) as pool:
        publishing = WAYS[way](context(pool, model, tmp_path, timeout_s=30))
        publishing.limit = 20
        with closing(publishing):
            publishing.publish(weights, "1")
    assert len(publishing.plan) == 4
    assert servers.waited == [True] * 3 * len(ENGINES)
