"""This module samples through sglang-router, which spreads requests over engines by its own rules.

The router gets `/generate` alone. What controls engines (weights, aborts, memory, profiles) goes to them directly, and
the fleet keeps the router's list of workers: an engine without the run's current weights is not on it. Tested with
sglang-router 0.3.2, which reads one prompt a request, drops `return_routed_experts`, and sends no API key to workers.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from fiberpo_megatron.engines import answers
from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.client import EngineClient, Sampling
from fiberpo_megatron.engines.connection import CONTROL_TIMEOUT_S
from fiberpo_megatron.engines.errors import EngineError, EngineRefused, EngineUnreachable
from fiberpo_megatron.types import Completion

SERVER_ERROR = 500
POLL_S = 0.1


class RouterClient(EngineClient):
    """Talks to one router as to an engine; see `EngineClient`."""

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        vocabulary: int | None = None,
        routing: RoutingShape | None = None,
        known_routes: int = 0,
        keep_aborted: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """Return one response to each prompt, each by a request of its own; see `EngineClient.generate`.

        Raises EngineUnreachable when the router could not reach an engine: the request may be asked again.
        """
        if routing is not None:
            raise ValueError("a router drops the request for routed experts; unset rollout.engine.router_url")
        seed_of: Sequence[int | None] = [None] * len(prompts) if seeds is None else seeds

        async def one(prompt: Sequence[int], seed: int | None) -> Completion:
            try:
                return await self.generate_one(prompt, sampling, seed, vocabulary, None, keep_aborted)
            except EngineRefused as error:
                if error.status is None or error.status < SERVER_ERROR:
                    raise
                raise EngineUnreachable(
                    self.url, f"the router reached no engine ({error.what})", "See the router's log and the engines'"
                ) from error

        return list(await asyncio.gather(*(one(*pair) for pair in zip(prompts, seed_of, strict=True))))

    async def workers(self) -> dict[str, str]:
        """Return the router's workers: their addresses with the router's names for them."""
        answer = await self._call("GET", "/workers", None, CONTROL_TIMEOUT_S)
        with self._answer_errors("/workers"):
            found = answers.field(answer, "workers", list)
            return {answers.field(one, "url", str).rstrip("/"): answers.field(one, "id", str) for one in found}

    async def keep(self, urls: Collection[str], timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Have the router use these engines and no others. It returns when the router says so.

        Raises EngineError that names the engines, when the router has not taken them after `timeout_s` (s).
        """
        wanted = {url.rstrip("/") for url in urls}
        known = await self.workers()
        for url in known.keys() - wanted:
            await self._call("DELETE", f"/workers/{known[url]}", None, CONTROL_TIMEOUT_S, json=False, accepted=True)
        for url in sorted(wanted - known.keys()):
            worker: Mapping[str, object] = {"url": url}
            await self._call("POST", "/workers", worker, CONTROL_TIMEOUT_S, json=False, accepted=True)
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (known := await self.workers()).keys() != wanted:
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError(
                    self.url,
                    f"it should use {sorted(wanted)}, but uses {sorted(known)} after {timeout_s:g} s",
                    "See its log; it has to reach the engines, and no other run may change its workers",
                )
            await asyncio.sleep(POLL_S)
