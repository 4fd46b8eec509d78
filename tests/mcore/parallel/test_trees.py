"""Messages of many ranks go along trees: simulated ranks are threads, and a queue stands for every connection."""

import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from math import ceil, log2
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.mcore.parallel import exchange

SIZES = (1, 2, 3, 5, 8, 13)


class Ranks:
    """Has the functions of torch.distributed that `exchange` uses, for a group of threads."""

    def __init__(self, size: int) -> None:
        self.size, self.here = size, threading.local()
        self.wires: dict[tuple[int, int, int], Queue[Tensor]] = defaultdict(Queue)
        self.received: Counter[int] = Counter()

    def get_world_size(self, group: Any) -> int:
        return self.size

    def get_rank(self, group: Any) -> int:
        return int(self.here.rank)

    def get_global_rank(self, group: Any, rank: int) -> int:
        return rank

    def send(self, tensor: Tensor, *, group: Any, group_dst: int, tag: int) -> None:
        self.wires[self.here.rank, group_dst, tag].put(tensor.clone())

    def isend(self, tensor: Tensor, **where: Any) -> Any:
        self.send(tensor, **where)
        return _Sent()

    def recv(self, tensor: Tensor, *, group: Any, group_src: int, tag: int) -> None:
        self.received[self.here.rank] += 1
        tensor.copy_(self.wires[group_src, self.here.rank, tag].get(timeout=20))

    def broadcast(self, tensor: Tensor, *, src: int, group: Any) -> None:
        if self.here.rank == src:
            for rank in range(self.size):
                self.wires[src, rank, 0].put(tensor.clone())
        tensor.copy_(self.wires[src, self.here.rank, 0].get(timeout=20))

    def run(self, work: Any) -> list[Any]:
        """Return what `work(rank)` returns on every rank."""

        def on(rank: int) -> Any:
            self.here.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))


@pytest.fixture
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    made = Ranks(request.param)
    for name in ("get_world_size", "get_rank", "get_global_rank", "send", "isend", "recv", "broadcast"):
        monkeypatch.setattr(exchange.dist, name, getattr(made, name))
    return made


class _Sent:
    def wait(self) -> None:
        pass


@pytest.mark.parametrize("ranks", SIZES, indirect=True)
def test_every_rank_hears_of_any_true_in_few_messages(ranks: Ranks):
    for true in [set(), *({rank} for rank in range(ranks.size)), set(range(ranks.size))]:
        ranks.received.clear()
        found = ranks.run(lambda rank, true=true: exchange.any_true(rank in true, None))
        assert found == [bool(true)] * ranks.size
        assert all(count == ceil(log2(ranks.size)) for count in ranks.received.values())


@pytest.mark.parametrize("ranks", SIZES, indirect=True)
def test_messages_of_all_sizes_arrive_in_rank_order(ranks: Ranks):
    def work(rank: int) -> list[list[int]]:
        message = torch.full((rank % 3 * 5,), rank, dtype=torch.uint8)
        return [part.tolist() for part in exchange.gather_bytes(message, None)]

    first, *others = ranks.run(work)
    assert first == [[rank] * (rank % 3 * 5) for rank in range(ranks.size)] and not any(others)
    assert ranks.received[0] <= 2 * ceil(log2(ranks.size)), "a length and a message from each branch of the tree"


@pytest.mark.parametrize("ranks", SIZES, indirect=True)
def test_every_rank_gets_all_values(ranks: Ranks):
    found = ranks.run(lambda rank: exchange.all_gather_json({"rank": rank, "text": "\u00fc" * rank}, None))
    assert found == [[{"rank": rank, "text": "\u00fc" * rank} for rank in range(ranks.size)]] * ranks.size
