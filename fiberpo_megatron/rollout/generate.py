"""Spreads generation over the engines and gives the synchronous trainer a sampler."""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.engines.client import EngineAddress, EngineClient, Sampling
from fiberpo_megatron.engines.errors import EngineRefused, SamplingStopped
from fiberpo_megatron.types import Completion

Result = TypeVar("Result")

STOP_POLL_S = 0.5
"""How often a request to stop is looked for while no response ends."""
Finished = Callable[[int, list[Completion]], None]
"""(index of a prompt, its completions), called from the sampler's thread."""


def response_seeds(seed: int, count: int) -> list[int]:
    """`count` sampling seeds of one prompt; hashed, so that neighbouring prompts share none."""
    digests = (hashlib.blake2b(f"{seed}:{i}".encode(), digest_size=8).digest() for i in range(count))
    return [int.from_bytes(digest, "little") >> 1 for digest in digests]


async def generate(
    clients: Sequence[EngineClient],
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    finished: Finished,
    *,
    max_concurrent: int,
    seeds: Sequence[int] | None = None,
    routed_experts: tuple[int, int] | None = None,
) -> None:
    """`count` responses to each prompt, handed to `finished` as they come. The first failure cancels the rest and is
    raised.

    Each prompt is a request of its own, for the engine with the fewest responses in flight: an answer comes when the
    slowest response of its request has ended, and what has come survives this process. `max_concurrent`: responses in
    flight, all engines together (one prompt's at least). `seeds`: one per prompt; the same seed, weights and sampling
    then give the same responses, whatever else the engines do.
    """
    slots = asyncio.Semaphore(max(len(clients), max_concurrent // count))
    in_flight = [0] * len(clients)

    async def send(index: int) -> None:
        drawn = None if seeds is None else response_seeds(seeds[index], count)
        async with slots:
            engine = in_flight.index(min(in_flight))
            in_flight[engine] += count
            try:
                completions = await clients[engine].generate(
                    [prompts[index]] * count, sampling, seeds=drawn, routed_experts=routed_experts
                )
            finally:
                in_flight[engine] -= count
        finished(index, completions)

    await _all_or_first_error([send(index) for index in range(len(prompts))])


async def _all_or_first_error(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; at the first error the rest is cancelled and that error raised."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EngineSampler:
    """The trainer's sampler: synchronous, with a thread for the network. Close it when done.

    `vocabulary`: token ids of a prompt must lie below it (without tokenizer, others kill SGLang's scheduler).
    `timeout_s`: of one prompt's request. `transport`: the network seam for tests.
    """

    def __init__(
        self,
        engines: Sequence[EngineAddress],
        sampling: Sampling,
        *,
        max_concurrent: int,
        timeout_s: float,
        vocabulary: int,
        routed_experts: tuple[int, int] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not engines:
            raise ValueError("no engines; give rollout.engine.urls or let the run start some")
        self.sampling, self.max_concurrent, self.vocabulary = sampling, max_concurrent, vocabulary
        self.routed_experts = routed_experts
        self._loop = BackgroundLoop("rollout")
        self._clients = [EngineClient(e, timeout_s, max_concurrent, transport) for e in engines]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        seeds: Sequence[int] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of a prompt, its `count` completions), each prompt (token ids) once, as they are finished. `seeds`:
        one per prompt. Once `stop` says so, what runs is cancelled and SamplingStopped raised."""
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; pass one seed per prompt")
        for index, prompt in enumerate(prompts):
            self._check_tokens(prompt, f"prompt {index}")
        return self._sampled(prompts, count, seeds, stop)

    def _sampled(
        self, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int] | None, stop: Callable[[], bool]
    ) -> Iterator[tuple[int, list[Completion]]]:
        came: SimpleQueue[tuple[int, list[Completion]] | None] = SimpleQueue()  # None: there is no more
        work = self._loop.submit(
            generate(
                self._clients,
                prompts,
                count,
                self.sampling,
                lambda index, completions: came.put((index, completions)),
                max_concurrent=self.max_concurrent,
                seeds=seeds,
                routed_experts=self.routed_experts,
            )
        )
        work.add_done_callback(lambda _: came.put(None))
        try:
            while True:  # not for ever: every request in `work` has its deadline
                try:
                    item = came.get(timeout=0 if stop() else STOP_POLL_S)
                except Empty:
                    if stop():
                        raise SamplingStopped from None
                    continue
                if item is None:
                    break
                yield item
            work.result()
        finally:
            work.cancel()

    def score(self, token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
        """Per engine: [len - 1] log-probs of token_ids[1:] at temperature 1."""
        self._check_tokens(token_ids, "the text to score")

        async def all_engines() -> list[NDArray[np.float32]]:
            return list(await asyncio.gather(*(client.score(token_ids) for client in self._clients)))

        return self._loop.run(all_engines())

    def require_memory_saver(self) -> None:
        """EngineRefused when an engine was started in a way that never gives memory up."""

        async def check(client: EngineClient) -> None:
            if not await client.memory_saver():
                raise EngineRefused(
                    client.url,
                    "it shares its GPUs with the trainer (rollout.engine.colocated), but cannot release their memory",
                    "Start it with --enable-memory-saver",
                    client.address.log,
                )

        self._on_all(check)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Every engine gives up the memory of `tags` ("kv_cache", "weights"), contents included."""
        self._on_all(lambda client: client.release_memory(tags))

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Every engine takes it again; weights must then be published."""
        self._on_all(lambda client: client.resume_memory(tags))

    def _on_all(self, call: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> None:
        self._loop.run(_all_or_first_error([call(client) for client in self._clients]))

    def close(self) -> None:
        """Close connections and thread; idempotent."""

        async def close_all() -> None:
            for client in self._clients:
                await client.close()

        if self._clients:
            self._loop.run(close_all())
            self._clients = []
        self._loop.close()

    def _check_tokens(self, token_ids: Sequence[int], what: str) -> None:
        if not token_ids:
            raise ValueError(f"{what} has no tokens; an engine cannot start from nothing")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"{what} has token {low if low < 0 else high}, but the model's vocabulary is 0 .. "
                f"{self.vocabulary - 1}; tokenizer and model do not belong together"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
