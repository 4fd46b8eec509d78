"""The prefix cache of a real SGLang server across publications.

A prefix that was computed with older weights gives later tokens wrong log-probs under a new version's name. Servers
without a GPU run without the cache (engines/command.py), because SGLang does not have it together with seeded sampling
there; the server of these tests has the cache and no seeds.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fiberpo_megatron.engines import process
from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.connection import Connection
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import engines
from fiberpo_megatron.engines.settings import EngineConfig
from tests.tiny_model import hugging_face_weights, load, log_probs, moved
from tests.weight_sync.sources import Tensors, context
from tests.weight_sync.trainer_rank import made_publisher

pytestmark = pytest.mark.sglang
ROUNDING = 1e-4
"""float32 on both sides; see test_real_engine.py."""
PROMPT = [5 * i % 61 + 2 for i in range(40)]


@pytest.fixture(scope="module")
def cached_engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineAddress]:
    """A real SGLang server with its prefix cache."""
    left_out = {"--disable-radix-cache", "--enable-deterministic-inference"}
    command = process.server_command

    def with_cache(*arguments: Any) -> list[str]:
        words = command(*arguments)
        assert left_out <= set(words), "then this server is no other than that of all tests"
        return [word for word in words if word not in left_out]

    folder = tmp_path_factory.mktemp("cached_engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "server_command", with_cache)
        with engines(EngineConfig(), checkpoint, folder, dtype="float32", gpu=False) as addresses:
            yield addresses[0]


@dataclass
class Sampled:
    cached: int
    """Tokens of the prompt that were not computed again."""
    tokens: list[int]
    log_probs: list[float]
    version: str


def sampled(engine: EngineAddress) -> Sampled:
    """Return what the server answers to PROMPT."""
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}, "return_logprob": True}
    headers = {"Authorization": f"Bearer {engine.api_key}"} if engine.api_key else {}
    answer = httpx.post(f"{engine.url}/generate", json=body, headers=headers, timeout=60).json()
    info = answer["meta_info"]
    found = [log_prob for log_prob, *_ in info["output_token_logprobs"]]
    return Sampled(info["cached_tokens"], answer["output_ids"], found, info["weight_version"])


def expected(model: Any, found: Sampled) -> np.ndarray:
    """Return what the trainer says about the sampled tokens."""
    return log_probs(model, [*PROMPT, *found.tokens])[len(PROMPT) - 1 :]


@pytest.mark.parametrize("method", ["disk", "distributed", "ipc", "delta"])
def test_no_prefix_of_older_weights_outlives_a_publication(
    method: str, cached_engine: EngineAddress, checkpoint: Path, tmp_path: Path, monkeypatch: Any
):
    old, new = load(checkpoint), moved(checkpoint)
    with (
        EnginePool([cached_engine], timeout_s=60) as pool,
        closing(made_publisher(method, context(pool, checkpoint, tmp_path))) as publishing,
    ):
        publishing.publish(Tensors(hugging_face_weights(old)), "1")
        first, again = sampled(cached_engine), sampled(cached_engine)
        assert (first.cached, again.cached) == (0, len(PROMPT) - 1), "the cache is on, and the publication emptied it"
        np.testing.assert_allclose(again.log_probs, expected(old, again), atol=ROUNDING)

        publishing.publish(Tensors(hugging_face_weights(new)), "2")
        fresh = sampled(cached_engine)
        assert (fresh.cached, fresh.version) == (0, "2")
        np.testing.assert_allclose(fresh.log_probs, expected(new, fresh), atol=ROUNDING)

        command = Connection._command

        async def forgets(self: Connection, path: str, request: Mapping[str, object], timeout_s: float) -> Any:
            return await command(self, path, {**request, "flush_cache": False}, timeout_s)

        monkeypatch.setattr(Connection, "_command", forgets)
        publishing.publish(Tensors(hugging_face_weights(old)), "3")
        stale = sampled(cached_engine)
        assert (stale.cached, stale.version) == (len(PROMPT) - 1, "3"), "without the flush the prefix is still there"
        assert np.abs(np.array(stale.log_probs) - expected(old, stale)).max() > 100 * ROUNDING, "and it is wrong"


def test_a_response_that_goes_on_under_new_weights_reads_all_of_its_tokens_again(
    cached_engine: EngineAddress, checkpoint: Path, tmp_path: Path
):
    """The publication takes a running request back; its own earlier tokens are a prefix of older weights too."""
    old, new = load(checkpoint), moved(checkpoint)
    with (
        EnginePool([cached_engine], timeout_s=60) as pool,
        closing(made_publisher("disk", context(pool, checkpoint, tmp_path))) as publishing,
    ):
        publishing.publish(Tensors(hugging_face_weights(old)), "1")
        running = pool.submit(pool.clients[0].generate([PROMPT] * 2, Sampling(300)))
        time.sleep(0.5)
        publishing.publish(Tensors(hugging_face_weights(new)), "2")
        longest = max(running.result(60), key=lambda completion: len(completion.token_ids))
    assert [span.version for span in longest.weight_spans] == ["1", "2"]
    for span, model in zip(longest.weight_spans, (old, new)):
        found = log_probs(model, [*PROMPT, *longest.token_ids])[len(PROMPT) - 1 :]
        inside = slice(span.start, span.end)
        np.testing.assert_allclose(longest.log_probs[inside], found[inside], atol=ROUNDING)
