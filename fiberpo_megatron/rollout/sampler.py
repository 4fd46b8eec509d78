"""Spreads the requests of generation over the engines.

A response is asked for in segments: one request after the other, each of which goes on behind the tokens that the ones
before it sampled. SGLang draws a token from a hash of the response's seed and the token's position, so that a response
that was cut anywhere goes on with the draws that it would have had, on any engine that has the same weights.
"""

import asyncio
import heapq
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.busy import BusyTimes
from fiberpo_megatron.engines.client import Sampling
from fiberpo_megatron.engines.errors import EngineError, EngineTimeout, EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.interfaces import Sampler, SamplingChange
from fiberpo_megatron.rollout.segments import join_segments
from fiberpo_megatron.types import Completion

MOST_AHEAD = 32
"""Responses that an engine may have in flight beyond the least busy one, and still get more of a prompt's."""
MOST_ENGINES = 3
"""Engines at which one request is tried. A request that kills its engine must not take the whole fleet with it."""
AVOIDED_S = 30.0
"""Seconds in which an engine that has failed a request gets new ones only where all engines have."""
POLL_S = 0.05
"""How often it is looked whether the last request has come back."""
ABORT_AGAIN_S = 1.0
"""Seconds after which what is still in flight is aborted once more."""
FAILURES = (EngineUnreachable, EngineTimeout)
"""What makes a request be asked again at another engine. One that refuses a request, or gives an answer that does not
fit, lives; another one would do the same, and the run ends."""


class EngineSampler:
    """This sampler uses the engines of a pool; it implements `interfaces.Sampler`.

    `max_concurrent`: responses in flight, all engines together (one request's at least). `vocabulary`: token ids of
    prompts and responses must lie below it (without tokenizer, others kill SGLang's scheduler). `routing`: what the
    experts of a token look like, when those of every token are asked for. `segment_tokens`: the largest number of
    tokens that one request samples; None: those of the response.

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
        segment_tokens: int | None = None,
    ) -> None:
        self.engines, self.sampling, self.vocabulary, self.routing = engines, sampling, vocabulary, routing
        self.segment_tokens = segment_tokens
        self.counts: Counter[str] = Counter()
        """Requests that were asked again elsewhere (`retried`), and that went on behind an abort (`continued`)."""
        self._slots = _Slots(max_concurrent)
        self._open = asyncio.Event()
        self._open.set()
        self._in_flight = [0] * len(engines.clients)
        self._failed_at: list[float | None] = [None] * len(engines.clients)
        """When an engine failed a request last (`time.monotonic`); None if its last request succeeded."""
        self._busy = BusyTimes(len(engines.clients))
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
        priority: int = 0,
    ) -> list[Completion]:
        """Return one response to the prompt for each seed; their first segments all come from one engine.

        It is the one that works on the same prompt already, because engines share the work on a prompt, unless that one
        has far more responses in flight than the others; otherwise the one with the fewest. A request that fails is
        asked again at another engine.

        The same seed, weights and sampling give the same response, whatever else the engines do, where the servers
        honour seeds. `change` is how an evaluation samples differently from the run; `max_tokens` and `stop_token_ids`
        narrow the sampling. Raises EngineError when several engines, or the only one, fail a request.
        """
        self._check_tokens(prompt, "a prompt")
        sampling = changed(self.sampling, change)
        if max_tokens is not None or stop_token_ids:
            limit = min(sampling.max_response_tokens, max_tokens or sampling.max_response_tokens)
            ends = (*sampling.stop_token_ids, *stop_token_ids)
            sampling = replace(sampling, max_response_tokens=limit, stop_token_ids=ends)
        firsts = await self._segment(tuple(prompt), (), seeds, sampling, priority)
        responses = [self._whole(tuple(prompt), one, seed, sampling, priority) for one, seed in zip(firsts, seeds)]
        return [await responses[0]] if len(responses) == 1 else list(await asyncio.gather(*responses))

    async def _whole(
        self, prompt: tuple[int, ...], first: Completion, seed: int, sampling: Sampling, priority: int
    ) -> Completion:
        """Return the response that begins with the segment `first`."""
        segments, sampled = [first], first.token_ids
        limit = sampling.max_response_tokens
        while not self._ended(segments[-1], limit - len(sampled) + len(segments[-1].token_ids)):
            if segments[-1].finish_reason == "abort":
                self.counts["continued"] += 1
            (further,) = await self._segment(prompt, sampled, [seed], sampling, priority)
            segments.append(further)
            sampled = (*sampled, *further.token_ids)
        response = join_segments(segments)
        return response if response.finish_reason != "abort" else replace(response, finish_reason="length")

    def _ended(self, segment: Completion, room: int) -> bool:
        """Whether a segment ends its response, of which `room` tokens were left when it began."""
        tokens = len(segment.token_ids)
        if segment.finish_reason == "stop" or tokens >= room:
            return True
        # "length" before the segment's own limit is the end of the engine's context
        return segment.finish_reason == "length" and tokens < min(room, self.segment_tokens or room)

    async def _segment(
        self,
        prompt: tuple[int, ...],
        sampled: tuple[int, ...],
        seeds: Sequence[int],
        sampling: Sampling,
        priority: int,
    ) -> list[Completion]:
        """Return what one request samples behind the prompt and the tokens that were sampled before, for each seed.

        A segment that `hold` has cut short ends with "abort", and may have no tokens.
        """
        left = sampling.max_response_tokens - len(sampled)
        asked = replace(sampling, max_response_tokens=min(left, self.segment_tokens or left))
        failures: list[EngineError] = []
        tried: list[int] = []
        while True:
            await self._open.wait()  # bounded by the deadline of the publication
            async with self._slots.taken(len(seeds), priority):
                if not self._open.is_set():
                    continue  # the engines were held while this waited for its slots
                engine = self._engine_for(prompt, tried)
                tried.append(engine)
                try:
                    with self._on(engine, prompt, len(seeds)):
                        completions = await self.engines.clients[engine].generate(
                            [[*prompt, *sampled]] * len(seeds),
                            asked,
                            seeds=seeds,
                            vocabulary=self.vocabulary,
                            routing=self.routing,
                            keep_aborted=lambda: not self._open.is_set(),
                        )
                except FAILURES as error:
                    failures.append(error)
                    self._failed_at[engine] = time.monotonic()
                    if len(failures) >= min(MOST_ENGINES, len(self.engines.clients)):
                        for other in failures[:-1]:
                            error.add_note(f"It was asked at {other.url} before: {other.what}")
                        raise
                    self.counts["retried"] += 1
                    continue
            self._failed_at[engine] = None
            return [replace(c, engines=np.full(len(c.token_ids), engine, np.int16)) for c in completions]

    @contextmanager
    def _on(self, engine: int, prompt: tuple[int, ...], responses: int) -> Iterator[None]:
        """Count responses as in flight on an engine."""
        self._in_flight[engine] += responses
        self._prompts[engine][prompt] += responses
        self._busy.began(engine)
        try:
            yield
        finally:
            self._busy.ended(engine)
            self._in_flight[engine] -= responses
            self._prompts[engine][prompt] -= responses
            self._prompts[engine] += Counter()  # forgets prompts of which nothing is in flight

    def _engine_for(self, prompt: tuple[int, ...], tried: Sequence[int] = ()) -> int:
        """Return the engine that gets the next response to a prompt: none of `tried`, and none that failed just now
        while there are others."""
        now = time.monotonic()
        fresh = [engine for engine in range(len(self._in_flight)) if engine not in tried]
        well = [e for e in fresh if (failed := self._failed_at[e]) is None or now - failed > AVOIDED_S]
        among = well or fresh or list(range(len(self._in_flight)))
        least = min(self._in_flight[engine] for engine in among)
        for engine in among:
            if self._prompts[engine][prompt] and self._in_flight[engine] <= least + MOST_AHEAD:
                return engine
        return min(among, key=lambda engine: self._in_flight[engine])

    # Between two versions of the weights

    def hold(self) -> None:
        """Send nothing more, until `release`. What is aborted meanwhile comes back with the tokens that it has, and
        goes on behind them."""

        async def close() -> None:
            self._open.clear()

        self.engines.run(close())

    def cut_short(self, deadline_s: float) -> None:
        """Abort what is in flight while requests are held, and wait until all of it has come back.

        It aborts again and again, because a request that was sent just before may reach its engine after an abort.
        Raises TimeoutError, which names the engines, after `deadline_s` (s).
        """

        async def cut() -> None:
            async with asyncio.timeout(deadline_s):
                while any(self._in_flight):
                    busy = [client for client, number in zip(self.engines.clients, self._in_flight) if number]
                    await asyncio.gather(*(client.abort_all() for client in busy))
                    until = time.monotonic() + ABORT_AGAIN_S
                    while any(self._in_flight) and time.monotonic() < until:
                        await asyncio.sleep(POLL_S)

        try:
            self.engines.run(cut())
        except TimeoutError:
            still = [
                f"{client.url} ({number})"
                for client, number in zip(self.engines.clients, self._in_flight, strict=True)
                if number
            ]
            raise TimeoutError(
                f"engines still have responses in flight {deadline_s:g} s after all were aborted: {', '.join(still)}; "
                "see their logs, or use rollout.partial = 'drain'"
            ) from None

    def release(self) -> None:
        """Send requests again."""

        async def open_() -> None:
            self._open.set()

        self.engines.run(open_())

    def take_busy(self) -> list[list[tuple[float, float]]]:
        """Return, for each engine, the times (begin, end; s since 1970) in which it had requests of this process, since
        the last call."""

        async def take() -> list[list[tuple[float, float]]]:
            return self._busy.take()

        return self.engines.run(take())

    def take_counts(self) -> dict[str, int]:
        """Return the counts since the last call."""
        counts, self.counts = self.counts, Counter()
        return dict(counts)

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
        priority: int = 0,
    ) -> list[Completion]:
        """Return responses that are sampled with the change of this sampler; `change` must be None."""
        assert change is None, "a changed sampler is not changed again"
        return await self.sampler.sample(
            prompt,
            seeds,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            change=self.change,
            priority=priority,
        )

    def score(self, token_ids: Sequence[int]) -> Sequence[ArrayLike]:
        """Return what the engines say about tokens, which no change affects."""
        return self.sampler.score(token_ids)


class _Slots:
    """Places for responses in flight. Requests of the lowest priority number come first, and among equals the one that
    asked first. A request that wants more places than there are waits until it is alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._numbers = count()
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        """A heap of (priority, when it asked, places, its turn)."""

    @asynccontextmanager
    async def taken(self, places: int, priority: int = 0) -> AsyncIterator[None]:
        first = not self._waiting or priority < self._waiting[0][0]
        if not first or not self._fits(places):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, next(self._numbers), places, turn))
            try:
                await turn  # bounded by the deadlines of the requests that hold the slots
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._taken -= places  # the slots were given just before the wait was cancelled
                self._wake()
                raise
        else:
            self._taken += places
        try:
            yield
        finally:
            self._taken -= places
            self._wake()

    def _fits(self, places: int) -> bool:
        return self._taken == 0 or self._taken + places <= self._total

    def _wake(self) -> None:
        while self._waiting and (self._waiting[0][3].done() or self._fits(self._waiting[0][2])):
            _, _, places, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._taken += places
                turn.set_result(None)
