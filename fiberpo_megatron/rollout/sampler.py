"""Spreads the requests of generation over the engines.

A response is asked for in segments: one request after the other, each of which goes on behind the tokens that the ones
before it sampled. SGLang draws a token from a hash of the response's seed and the token's position, so that a response
that was cut anywhere goes on with the draws that it would have had, on any engine that has the same weights.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.busy import BusyTimes, Interval
from fiberpo_megatron.engines.client import EngineClient, Sampling
from fiberpo_megatron.engines.errors import EngineError, EngineReplaced, EngineTimeout, EngineUnreachable
from fiberpo_megatron.engines.liveness import Liveness
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.router import RouterClient
from fiberpo_megatron.environments import ToolCall
from fiberpo_megatron.interfaces import SamplingChange, Segments
from fiberpo_megatron.rollout.changed_sampler import changed
from fiberpo_megatron.rollout.segments import join_segments
from fiberpo_megatron.rollout.slots import Slots
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import Completion

SPILL, SLACK = 1.25, 16
"""An engine gets more of a group that it knows while it has no more responses in flight than SPILL times the mean of
all engines and SLACK."""
MOST_HOMES = 1 << 16
"""Groups whose engine is remembered."""
MOST_ENGINES = 3
"""Engines at which one request is tried. A request that kills its engine must not take the whole fleet with it."""
AVOIDED_S = 30.0
"""Seconds in which an engine that has failed a request gets new ones only where all engines have."""
POLL_S = 0.05
"""How often it is looked whether the last request has come back."""
ABORT_AGAIN_S = 1.0
"""Seconds after which what is still in flight is aborted once more."""
FAILURES = (EngineUnreachable, EngineTimeout, EngineReplaced)
"""What makes a request be asked again at another engine. One that refuses a request, or gives an answer that does not
fit, lives; another one would do the same, and the run ends."""


class EngineSampler:
    """This sampler uses the engines of a pool; it implements `interfaces.Sampler`.

    `max_concurrent`: responses in flight, all engines together (one request's at least). `vocabulary`: token ids of
    prompts and responses must lie below it (without tokenizer, others kill SGLang's scheduler). `routing`: what the
    experts of a token look like, when those of every token are asked for. `segment_tokens`: the largest number of
    tokens that one request samples; None: those of the response. `silence_s`: seconds after which an engine that has
    requests and says nothing is given up; 0: none is. `router`: what requests for tokens go through; every token then
    counts as one of engine 0.

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
        silence_s: float = 0.0,
        router: RouterClient | None = None,
    ) -> None:
        self.engines, self.sampling, self.vocabulary, self.routing = engines, sampling, vocabulary, routing
        self.segment_tokens = segment_tokens
        self.counts: Counter[str] = Counter()
        """Requests that were asked again elsewhere (`retried`), that went on behind an abort (`continued`), and that an
        earlier start of the run had asked (`resumed`)."""
        self._router = router
        self._slots = Slots(max_concurrent)
        self._open = asyncio.Event()
        self._open.set()
        self._in_flight: Counter[int] = Counter()
        self._failed_at: dict[int, float] = {}
        """When an engine failed a request (the event loop's time), unless a later one succeeded."""
        self._busy = BusyTimes()
        self._homes: OrderedDict[Hashable, int] = OrderedDict()
        """The engine that worked on a group last."""
        self._liveness = Liveness(silence_s)
        self._serving: frozenset[int] | None = None
        """Engines that may get requests; None: all that the pool has."""
        self._publishing = False
        """Whether a publication is under way, after which engines that join may serve."""
        self._versions: set[str] | None = None
        """Versions of the weights that engines may have; None: any."""

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
        priority: int = 0,
        track: Track | None = None,
        known_routes: int = 0,
        segments: Segments | None = None,
    ) -> list[Completion]:
        """Return one response to the prompt for each seed; their first segments all come from one engine.

        It is the one that worked on the same group last, because engines share the work on a prompt and on the turns of
        a conversation, unless that one has far more responses in flight than the others; otherwise the one with the
        fewest. Groups are known by their `priority`, and those without one by their prompt. A request that fails
        is asked again at another engine.

        The same seed, weights and sampling give the same response, whatever else the engines do, where the servers
        honour seeds. `change` is how an evaluation samples differently from the run; `max_tokens` and `stop_token_ids`
        narrow the sampling. `track` gets the requests and the waits for them. `segments` keeps what requests have
        sampled, and has what was sampled before a resume. Raises EngineError when several engines, or the only one,
        fail a request.
        """
        self._check_tokens(prompt, "a prompt")
        sampling = changed(self.sampling, change)
        if max_tokens is not None or stop_token_ids:
            limit = min(sampling.max_response_tokens, max_tokens or sampling.max_response_tokens)
            ends = (*sampling.stop_token_ids, *stop_token_ids)
            sampling = replace(sampling, max_response_tokens=limit, stop_token_ids=ends)
        asked = _Response(tuple(prompt), sampling, priority, track or Track(), known_routes, segments)
        earlier = [[] if segments is None else segments.earlier(asked.prompt, seed) for seed in seeds]
        fresh = [number for number, known in enumerate(earlier) if not known]
        if resumed := sum(map(len, earlier)):
            self.counts["resumed"] += resumed
        if fresh:
            firsts = await self._segment(asked, (), [seeds[number] for number in fresh])
            for number, first in zip(fresh, firsts, strict=True):
                earlier[number] = [first]
        responses = [self._whole(asked, known, seed) for known, seed in zip(earlier, seeds)]
        return [await responses[0]] if len(responses) == 1 else list(await asyncio.gather(*responses))

    async def _whole(self, asked: "_Response", known: Sequence[Completion], seed: int) -> Completion:
        """Return the response that begins with the segments `known`."""
        segments, limit = list(known), asked.sampling.max_response_tokens
        sampled = tuple(token for segment in segments for token in segment.token_ids)
        while not self._ended(segments[-1], limit - len(sampled) + len(segments[-1].token_ids)):
            if segments[-1].finish_reason == "abort":
                self.counts["continued"] += 1
            (further,) = await self._segment(asked, sampled, [seed])
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

    async def _segment(self, response: "_Response", sampled: tuple[int, ...], seeds: Sequence[int]) -> list[Completion]:
        """Return what one request samples behind the prompt and the tokens that were sampled before, for each seed.

        A segment that `hold` has cut short ends with "abort", and may have no tokens.
        """
        with response.track.phase("queued"):  # except while a request is at an engine
            segments = await self._asked(response, sampled, seeds)
        if response.segments is not None:
            for seed, segment in zip(seeds, segments, strict=True):
                if segment.token_ids:
                    response.segments.ended(response.prompt, seed, len(sampled), segment)
        return segments

    async def _asked(self, response: "_Response", sampled: tuple[int, ...], seeds: Sequence[int]) -> list[Completion]:
        """Return the answers to one request, which may be sent to several engines."""
        prompt, sampling, priority, track = response.prompt, response.sampling, response.priority, response.track
        # of the tokens that were sampled, the last one was not read
        known_routes = len(prompt) + len(sampled) - 1 if sampled else response.known_routes
        left = sampling.max_response_tokens - len(sampled)
        asked = replace(sampling, max_response_tokens=min(left, self.segment_tokens or left))
        failures: list[EngineError] = []
        tried: list[int] = []
        while True:
            await self._open.wait()  # bounded by the deadline of the publication
            async with self._slots.taken(len(seeds), priority):
                if not self._open.is_set():
                    continue  # the engines were held while this waited for its slots
                while self._publishing and not self._can_serve():
                    await asyncio.sleep(POLL_S)  # bounded by the deadline of the publication
                engine = self._engine_for(priority or prompt, tried)
                client: EngineClient = self._router or self.engines.members[engine]
                tried.append(engine)
                try:
                    with self._on(engine, len(seeds)), track.request(engine) as answer:
                        request = client.generate(
                            [[*prompt, *sampled]] * len(seeds),
                            asked,
                            seeds=seeds,
                            vocabulary=self.vocabulary,
                            routing=self.routing,
                            known_routes=known_routes,
                            keep_aborted=lambda: not self._open.is_set(),
                        )
                        completions = await self._liveness.request(client, request)
                        self._check_weights(engine, client, completions)
                        answer.tokens = sum(len(one.token_ids) for one in completions)
                        answer.versions = tuple(dict.fromkeys(s.version for c in completions for s in c.weight_spans))
                        answer.finish = completions[0].finish_reason
                except FAILURES as error:
                    failures.append(error)
                    self._failed_at[engine] = asyncio.get_running_loop().time()
                    if len(failures) >= self._most_tries(tried):
                        for other in failures[:-1]:
                            error.add_note(f"It was asked at {other.url} before: {other.what}")
                        raise
                    self.counts["retried"] += 1
                    continue
            self._failed_at.pop(engine, None)
            return [replace(c, engines=np.full(len(c.token_ids), engine, np.int16)) for c in completions]

    @contextmanager
    def _on(self, engine: int, responses: int) -> Iterator[None]:
        """Count responses as in flight on an engine."""
        self._in_flight[engine] += responses
        self._busy.began(engine)
        try:
            yield
        finally:
            self._busy.ended(engine)
            self._in_flight[engine] -= responses

    def _engine_for(self, group: Hashable, tried: Sequence[int] = ()) -> int:
        """Return the engine that gets the next response of a group: none of `tried`, and none that failed just now
        while there are others."""
        now, serving = asyncio.get_running_loop().time(), self._serves()
        if self._router is not None:
            return 0
        fresh = [engine for engine in serving if engine not in tried]
        well = [e for e in fresh if (failed := self._failed_at.get(e)) is None or now - failed > AVOIDED_S]
        among = well or fresh or serving
        most = SPILL * sum(self._in_flight[engine] for engine in among) / len(among) + SLACK
        home = self._homes.get(group)
        if home not in among or self._in_flight[home] > most:
            home = min(among, key=lambda engine: self._in_flight[engine])
        self._homes[group] = home
        self._homes.move_to_end(group)
        if len(self._homes) > MOST_HOMES:
            self._homes.popitem(last=False)
        return home

    def _most_tries(self, tried: Collection[int]) -> int:
        """Return how often a request may be sent that has failed at the engines `tried`: once for each engine, and more
        often while one serves that it was not sent to, because those that failed may be no members any more."""
        serving = self._can_serve()
        others = not set(serving) <= set(tried) or (self._publishing and not serving)
        return MOST_ENGINES if others and self._router is None else min(MOST_ENGINES, len(self.engines.members))

    def _can_serve(self) -> list[int]:
        """Return the engines that may get requests."""
        return [n for n in self.engines.numbers if self._serving is None or n in self._serving]

    def _serves(self) -> list[int]:
        """Return the engines that may get requests. Raises EngineUnreachable when there is none."""
        found = self._can_serve()
        if not found:
            client = self.engines.clients[0]
            raise EngineUnreachable(
                client.url, "no engine of the run serves its weights any more", "See `fiberpo engines RUN_FOLDER`"
            )
        return found

    def _check_weights(self, engine: int, client: EngineClient, completions: Sequence[Completion]) -> None:
        """Raise EngineReplaced for a response of weights that this run has never published: the server was started
        again, or serves another run. It gets no more requests until the next publication."""
        seen = {span.version for completion in completions for span in completion.weight_spans}
        if self._versions is None or seen <= self._versions:
            return
        if self._router is None:
            self._serving = frozenset(number for number in self._serves() if number != engine)
        raise EngineReplaced(
            client.url,
            f"it answered with weights {sorted(seen - self._versions)}, which this run has not published",
            "It was started again, or another run publishes to it; it gets no requests until it has the run's weights",
            client.address.log,
        )

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
                loop = asyncio.get_running_loop()
                while busy := self._busy_clients():
                    await asyncio.gather(*(self._abort(client) for client in busy))
                    until = loop.time() + ABORT_AGAIN_S
                    while self._in_flight.total() and loop.time() < until:
                        await asyncio.sleep(POLL_S)

        try:
            self.engines.run(cut())
        except TimeoutError:
            members = self.engines.members.items()
            still = [f"{client.url} ({self._in_flight[n]})" for n, client in members if self._in_flight[n]]
            raise TimeoutError(
                f"engines still have responses in flight {deadline_s:g} s after all were aborted: {', '.join(still)}; "
                "see their logs, or use rollout.partial = 'drain'"
            ) from None

    async def _abort(self, client: EngineClient) -> None:
        """Abort what an engine works on. One that does not answer is given up: its requests are asked elsewhere."""
        try:
            await client.abort_all()
        except FAILURES as error:
            self._liveness.lose(client, f"its requests could not be aborted ({error.what})")

    def _busy_clients(self) -> list[EngineClient]:
        """The clients of engines that have requests in flight, or may have."""
        if self._router is not None:
            return self.engines.clients if self._in_flight.total() else []
        return [client for number, client in self.engines.members.items() if self._in_flight[number]]

    def release(self) -> None:
        """Send requests again."""

        async def open_() -> None:
            self._open.set()

        self.engines.run(open_())

    # The fleet

    def serve(self, engines: Collection[int], version: str | None = None, watched: bool = True) -> None:
        """Send requests to these engines alone, of those that the pool has. `version`: weights that they have from now
        on. `watched`: whether one that says nothing is given up; a publication may keep it from answering.

        Requests of an engine that the pool no longer has are asked elsewhere.
        """

        async def take_over() -> None:
            self._serving = frozenset(engines)
            if version is not None and version not in (self._versions or ()):
                self._versions = (self._versions or set()) | {version}
                self._homes.clear()  # with the old weights the engines' caches have gone
            self._publishing = not watched
            if watched:
                self._liveness.go_on()
            else:
                self._liveness.suspend()
            if self._router is None:
                self._liveness.keep(self.engines.clients)
            self._failed_at.clear()

        self.engines.run(take_over())

    def take_busy(self) -> dict[int, list[Interval]]:
        """Return, for each engine by number, the times (begin, end; s since 1970) in which it had requests of this
        process, since the last call."""

        async def take() -> dict[int, list[Interval]]:
            numbers = self.engines.numbers if self._router is None else [0]
            return dict.fromkeys(numbers, []) | self._busy.take()

        return self.engines.run(take())

    async def parse_tool_calls(
        self, text: str, tools: Sequence[Mapping[str, Any]], parser: str
    ) -> tuple[str, tuple[ToolCall, ...]]:
        """Have an engine parse tool calls; see `EngineClient.parse_tool_calls`. The next one is asked for one that is
        lost."""
        failures: list[EngineError] = []
        for engine in self._serves():
            try:
                return await self.engines.members[engine].parse_tool_calls(text, tools, parser)
            except (EngineUnreachable, EngineTimeout) as error:
                failures.append(error)
        raise failures[-1]

    def take_counts(self) -> dict[str, int]:
        """Return the counts since the last call."""
        counts, self.counts = self.counts, Counter()
        return dict(counts)

    def score(self, token_ids: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Return the [len - 1] log-probs of token_ids[1:] at temperature 1 by the number of the engine. One that does
        not answer is left out. Where none answers, an error is raised."""
        self._check_tokens(token_ids, "the text to score")
        members = self.engines.members

        async def score_all() -> list[NDArray[np.float32] | BaseException]:
            work = (client.score(token_ids) for client in members.values())
            return await asyncio.gather(*work, return_exceptions=True)

        found = dict(zip(members, self.engines.run(score_all()), strict=True))
        scores = {number: one for number, one in found.items() if not isinstance(one, BaseException)}
        for error in found.values():
            if isinstance(error, BaseException) and (not scores or not isinstance(error, FAILURES)):
                raise error
        return scores

    def _check_tokens(self, token_ids: Sequence[int], what: str) -> None:
        if not token_ids:
            raise ValueError(f"{what} has no tokens; an engine cannot start from nothing")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"{what} has token {low if low < 0 else high}, but the model's vocabulary is 0 .. "
                f"{self.vocabulary - 1}; tokenizer and model do not belong together"
            )


@dataclass(frozen=True)
class _Response:
    """It says how the responses to one prompt are asked for."""

    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int
    track: Track
    known_routes: int
    """Positions of the prompt whose experts an earlier answer has."""
    segments: Segments | None
