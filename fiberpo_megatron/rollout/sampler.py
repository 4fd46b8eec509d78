"""Spreads the requests of generation over the engines."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.client import Sampling
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.interfaces import Sampler, SamplingChange
from fiberpo_megatron.types import Completion

MOST_AHEAD = 32
"""Responses that an engine may have in flight beyond the least busy one, and still get more of a prompt's."""


class EngineSampler:
    """This sampler uses the engines of a pool; it implements `interfaces.Sampler`.

    `max_concurrent`: responses in flight, all engines together (one request's at least). `vocabulary`: token ids of
    prompts and responses must lie below it (without tokenizer, others kill SGLang's scheduler). `routing`: what the
    experts of a token look like, when those of every token are asked for.

        sampler = EngineSampler(pool, Sampling(max_response_tokens=64), max_concurrent=256, vocabulary=151936)
        completions = pool.run(sampler.sample([1, 2, 3], seeds=[7, 8]))
    """

    def __init__(
        self,
        engines: EnginePool,
        sampling: Sampling,
        *,
        max_concurrent: int,
        vocabulary: int,
        routing: RoutingShape | None = None,
    ) -> None:
        self.engines, self.sampling, self.vocabulary, self.routing = engines, sampling, vocabulary, routing
        self._slots = _Slots(max_concurrent)
        self._in_flight = [0] * len(engines.clients)
        self._prompts: list[Counter[tuple[int, ...]]] = [Counter() for _ in engines.clients]
        """Responses in flight of each engine, by their prompt."""

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
    ) -> list[Completion]:
        """Return one response to the prompt for each seed, all from one engine.

        It is the one that works on the same prompt already, because engines share the work on a prompt, unless that one
        has far more responses in flight than the others; otherwise the one with the fewest.

        The same seed, weights and sampling give the same response, whatever else the engines do, where the servers
        honour seeds. `change` is how an evaluation samples differently from the run; `max_tokens` and `stop_token_ids`
        narrow the sampling.
        """
        self._check_tokens(prompt, "a prompt")
        sampling = changed(self.sampling, change)
        if max_tokens is not None or stop_token_ids:
            limit = min(sampling.max_response_tokens, max_tokens or sampling.max_response_tokens)
            ends = (*sampling.stop_token_ids, *stop_token_ids)
            sampling = replace(sampling, max_response_tokens=limit, stop_token_ids=ends)
        async with self._slots.taken(len(seeds)):
            engine = self._engine_for(tuple(prompt))
            self._in_flight[engine] += len(seeds)
            self._prompts[engine][tuple(prompt)] += len(seeds)
            try:
                completions = await self.engines.clients[engine].generate(
                    [prompt] * len(seeds), sampling, seeds=seeds, vocabulary=self.vocabulary, routing=self.routing
                )
            finally:
                self._in_flight[engine] -= len(seeds)
                self._prompts[engine][tuple(prompt)] -= len(seeds)
                self._prompts[engine] += Counter()  # forgets prompts of which nothing is in flight
        return [replace(c, engines=np.full(len(c.token_ids), engine, np.int16)) for c in completions]

    def _engine_for(self, prompt: tuple[int, ...]) -> int:
        """Return the engine that gets the next response to a prompt."""
        least = min(self._in_flight)
        for engine, prompts in enumerate(self._prompts):
            if prompts[prompt] and self._in_flight[engine] <= least + MOST_AHEAD:
                return engine
        return self._in_flight.index(least)

    def score(self, token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
        """Return per engine [len - 1] log-probs of token_ids[1:] at temperature 1."""
        self._check_tokens(token_ids, "the text to score")
        return self.engines.on_all(lambda client: client.score(token_ids))

    def _check_tokens(self, token_ids: Sequence[int], what: str) -> None:
        if not token_ids:
            raise ValueError(f"{what} has no tokens; an engine cannot start from nothing")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"{what} has token {low if low < 0 else high}, but the model's vocabulary is 0 .. "
                f"{self.vocabulary - 1}; tokenizer and model do not belong together"
            )


def changed(sampling: Sampling, change: SamplingChange | None) -> Sampling:
    """Return the run's sampling with what an evaluation changes."""
    if change is None:
        return sampling
    wanted = {name: value for name, value in vars(change).items() if value is not None}
    if wanted.get("temperature") == 0:  # SGLang's own way to say greedy; its kernels do not divide by 0
        wanted |= {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    return replace(sampling, **wanted)


@dataclass(frozen=True)
class ChangedSampler:
    """It implements `interfaces.Sampler` for an evaluation that samples differently from the run."""

    sampler: Sampler
    change: SamplingChange

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
    ) -> list[Completion]:
        """Return responses that are sampled with the change of this sampler; `change` must be None."""
        assert change is None, "a changed sampler is not changed again"
        return await self.sampler.sample(
            prompt, seeds, max_tokens=max_tokens, stop_token_ids=stop_token_ids, change=self.change
        )

    def score(self, token_ids: Sequence[int]) -> Sequence[ArrayLike]:
        """Return what the engines say about tokens, which no change affects."""
        return self.sampler.score(token_ids)


class _Slots:
    """Places for responses in flight, given out in the order in which they were asked for. A request that wants more
    than there are waits until it is alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        if self._waiting or not self._fits(count):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((count, turn))
            try:
                await turn  # bounded by the deadlines of the requests that hold the slots
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._taken -= count  # the slots were given just before the wait was cancelled
                self._wake()
                raise
        else:
            self._taken += count
        try:
            yield
        finally:
            self._taken -= count
            self._wake()

    def _fits(self, count: int) -> bool:
        return self._taken == 0 or self._taken + count <= self._total

    def _wake(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            count, turn = self._waiting.popleft()
            if not turn.done():
                self._taken += count
                turn.set_result(None)
