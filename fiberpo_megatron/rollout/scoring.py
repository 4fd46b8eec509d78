"""This module has trajectories scored by SGLang servers that serve another model: a teacher, or a reference.

What such a server gives for a response token is its log-prob under the served model, given every token before it (the
prompt, earlier turns and what the environment said between them), at temperature 1 and before top-p and top-k. SGLang
scores prompts at no other temperature, so a run that samples at another one is refused before it starts.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron import interfaces
from fiberpo_megatron.data.tokenizer import Tokenizer
from fiberpo_megatron.engines.client import EngineClient
from fiberpo_megatron.engines.errors import EngineAborted, EngineError, EngineRefused, EngineTimeout, EngineUnreachable
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.settings import ScoringServers
from fiberpo_megatron.printable import printable

LOST = (EngineAborted, EngineTimeout, EngineUnreachable)
"""Failures after which a request is sent again. Scoring changes nothing in a server, so that a second one is safe."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""The pause before a request is sent again doubles each time: servers that restart need a minute."""
PROBED_TOKENS = 512
"""Token ids whose text is compared; a tokenizer of another family differs in nearly all of them."""


class ScoringFailed(RuntimeError):
    """Servers that score a run's trajectories failed, or have another vocabulary; the message says which, and what to
    do."""


class ServedScores:
    """Scores trajectories on the servers of a pool; it implements `interfaces.Scorer`.

    `section`: where the config names the servers. Use it inside the event loop of the pool.

        scores = ServedScores(pool, config.algorithm.distillation.teacher, "algorithm.distillation.teacher")
        log_probs = await scores.log_probs(prompt_ids, response_ids)
    """

    def __init__(self, pool: EnginePool, settings: ScoringServers, section: str) -> None:
        self.pool, self.section = pool, section
        self._retries = settings.retries
        self._slots = asyncio.Semaphore(settings.max_concurrent_requests)
        self._in_flight = [0] * len(pool.clients)
        self._counts = {"trajectories": 0.0, "retries": 0.0, "seconds": 0.0}

    def take_counts(self) -> Mapping[str, float]:
        """Return, since the last call, how many trajectories were scored, how often a request was sent again, and the
        seconds in which a request was out, summed over trajectories."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0.0)
        return counts

    async def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> NDArray[np.float32]:
        """Return [T], the log-prob of each token of `response` after `prompt` under the served model.

        nan says that the server cannot score a token (the last id of the vocabulary, in SGLang 0.5). Raises
        ScoringFailed when no server has answered after all retries, or when one refuses the request.
        """
        tokens = [*prompt, *response]
        async with self._slots:  # bounded by the deadlines of the requests that hold the slots
            failed: EngineError | None = None
            began = time.monotonic()
            for attempt in range(self._retries + 1):
                if attempt:
                    self._counts["retries"] += 1
                    await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))
                try:
                    found = await self._score(tokens, len(prompt), attempt)
                    self._counts["trajectories"] += 1
                    self._counts["seconds"] += time.monotonic() - began
                    return found
                except LOST as error:
                    failed = error
                except EngineError as error:
                    raise self._failure(len(tokens), error, attempt + 1) from error
            assert failed is not None, "each attempt returns or fails"
            raise self._failure(len(tokens), failed, self._retries + 1) from failed

    async def _score(self, tokens: Sequence[int], first: int, attempt: int) -> NDArray[np.float32]:
        """Ask the server with the fewest requests in flight; a later attempt asks the next one."""
        busy = self._in_flight
        server = (busy.index(min(busy)) + attempt) % len(busy)
        busy[server] += 1
        try:
            return await self.pool.clients[server].score(tokens, first)
        finally:
            busy[server] -= 1

    def _failure(self, tokens: int, error: EngineError, attempts: int) -> ScoringFailed:
        return ScoringFailed(
            f"a trajectory of {tokens} tokens could not be scored by the servers of {self.section} in {attempts} "
            f"attempt{'s' if attempts > 1 else ''}: {error} Finished groups are kept: correct the server or "
            f"{self.section}, then continue the run with --resume"
        )


async def check_vocabulary(
    client: EngineClient, tokenizer: Tokenizer, ids: Sequence[int], *, vocabulary: int, section: str, trust: bool
) -> None:
    """Raise ScoringFailed unless a server's model has the run's vocabulary, as far as the server says it.

    Its vocabulary must have the run's last token id, `vocabulary` - 1 (it may be larger), and its tokenizer must give
    each token of `ids` the text that `tokenizer` gives it. Ids that are not among `ids` are not compared. With `trust`
    only the size is checked.
    """
    try:
        await client.check_token(vocabulary - 1)
    except EngineRefused as error:
        raise ScoringFailed(
            f"{section}: the model that {client.url} serves does not have token {vocabulary - 1}, the last one of this "
            f"run's model ({error.what}); choose a model with the same vocabulary"
        ) from error
    if trust:
        return
    try:
        theirs = await client.texts(ids)
    except EngineRefused as error:
        raise ScoringFailed(
            f"{section}: {client.url} did not say what its tokens mean ({error.what}); start it without "
            f"--skip-tokenizer-init, or set {section}.trust_vocabulary = true if its token ids are those of model.path"
        ) from error
    ours = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    differing = [place for place in range(len(ids)) if ours[place] != theirs[place]]
    if differing:
        place = differing[0]
        raise ScoringFailed(
            f"{section}: the vocabulary of {client.url} is not this run's: {len(differing)} of {len(ids)} compared "
            f"tokens have another text, such as token {ids[place]}, which is {printable(repr(theirs[place]))[:80]} to "
            f"the server and {printable(repr(ours[place]))[:80]} to the tokenizer of model.path; choose a model with "
            "the same tokenizer"
        )


def probed_tokens(known: int, special: Sequence[int] = ()) -> list[int]:
    """Return the ids whose texts are compared, ascending: `special` ones, and others spread evenly over [0, known)."""
    count = min(known, PROBED_TOKENS)
    return sorted({*special, *(place * known // count for place in range(count))})


if TYPE_CHECKING:  # mypy compares it with the protocol

    def _scorer(scores: ServedScores) -> interfaces.Scorer:
        return scores
