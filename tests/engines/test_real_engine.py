"""The client and the sampler against a real SGLang server."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest

from fiberpo_megatron.engines.answers import RESPONSE_BYTES, Asked, RoutingShape
from fiberpo_megatron.engines.client import EngineAddress, EngineClient, Sampling
from fiberpo_megatron.engines.errors import EngineAborted, EngineRefused
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import engines as started
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.environments import ToolCall
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.types import WeightSpan
from tests.rollout.in_order import in_order
from tests.tiny_model import EOS, LAYERS, TOP_K, VOCABULARY, chosen_experts, load, log_probs

pytestmark = pytest.mark.sglang
ROUNDING = 1e-4
"""float32 on both sides; other summation orders were seen to move log-probs by 5e-6."""
PROMPTS = [[2 + i, 9, 4, 33 - i, 6] for i in range(6)]


@contextmanager
def sampler(engine: EngineAddress, sampling: Sampling, **options) -> Iterator[EngineSampler]:
    with EnginePool([engine], timeout_s=60) as pool:
        yield EngineSampler(pool, sampling, max_concurrent=64, vocabulary=VOCABULARY, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_experts_are_those_of_transformers(engine, checkpoint, temperature):
    model = load(checkpoint)
    sampling = Sampling(8, temperature=temperature)
    with sampler(engine, sampling, routing=RoutingShape(LAYERS, TOP_K, 4)) as engines:
        groups = in_order(engines, PROMPTS, 2)
    assert [len(group) for group in groups] == [2] * len(PROMPTS)
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            tokens = [*prompt, *completion.token_ids]
            expected = log_probs(model, tokens, temperature)[len(prompt) - 1 :]
            np.testing.assert_allclose(completion.log_probs, expected, atol=ROUNDING)
            experts = completion.routed_experts
            assert experts is not None and experts.shape == (len(tokens) - 1, LAYERS, TOP_K)
            np.testing.assert_array_equal(experts, chosen_experts(model, tokens)[:-1])
            assert completion.weight_spans == (WeightSpan("checkpoint", 0, len(completion.token_ids)),)


def test_a_response_ends_at_a_stop_token_or_the_limit(engine):
    stops = tuple(range(0, VOCABULARY, 8))
    with sampler(engine, Sampling(6, stop_token_ids=stops)) as engines:
        completions = [c for group in in_order(engines, PROMPTS, 4) for c in group]
    reasons = Counter(c.finish_reason for c in completions)
    assert set(reasons) == {"stop", "length"}
    for completion in completions:
        inner, last = completion.token_ids[:-1], completion.token_ids[-1]
        assert not set(inner) & {EOS, *stops}
        assert (last in {EOS, *stops}) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == 6 or completion.finish_reason == "stop"


def test_seeds_decide_the_responses_whatever_else_is_in_the_batch(engine):
    seeds = [100 + i for i in range(len(PROMPTS))]
    with sampler(engine, Sampling(6)) as engines:
        first = in_order(engines, PROMPTS, 3, seeds)
        backwards = in_order(engines, PROMPTS[::-1], 3, seeds[::-1])[::-1]
        alone = in_order(engines, PROMPTS[:1], 3, seeds[:1])
        other = in_order(engines, PROMPTS, 3, [seed + 1000 for seed in seeds])
    tokens = [[c.token_ids for c in group] for group in first]
    assert [[c.token_ids for c in group] for group in backwards] == tokens
    assert [c.token_ids for c in alone[0]] == tokens[0]
    assert [[c.token_ids for c in group] for group in other] != tokens
    assert all(len(set(group)) > 1 for group in tokens), "samples of one prompt must differ"


def test_seeded_sampling_follows_the_policy(engine, checkpoint):
    """The hash behind it is our own stand-in: 4096 draws must have the policy's frequencies."""
    draws = 4096
    with sampler(engine, Sampling(1)) as engines:
        counts = Counter(c.token_ids[0] for group in in_order(engines, [[5, 9, 4]] * 16, 256, range(16)) for c in group)
    model = load(checkpoint)
    for token in range(VOCABULARY):
        p = math.exp(log_probs(model, [5, 9, 4, token])[-1])
        # 4.5 standard deviations: 64 tokens leave the band once in 2300 sets of seeds, and the seeds are fixed
        assert abs(counts[token] / draws - p) <= 4.5 * math.sqrt(p * (1 - p) / draws) + 1 / draws, token


def test_score_is_the_log_prob_of_the_given_tokens(engine, checkpoint):
    tokens = [3, 50, 7, 22, 8, 41]
    with sampler(engine, Sampling(1)) as engines:
        (scores,) = engines.score(tokens).values()
    np.testing.assert_allclose(scores, log_probs(load(checkpoint), tokens), atol=ROUNDING)


def test_what_the_server_refuses_is_said(engine):
    with sampler(engine, Sampling(1)) as engines, pytest.raises(EngineRefused, match=r"600 tokens.*longer than"):
        in_order(engines, [[2] * 600], 1)


def test_abort_pause_and_checksum(engine, checkpoint):
    async def run() -> None:
        async with EngineClient(engine, timeout_s=60) as client:
            running = asyncio.create_task(client.generate([[2, 3]], Sampling(400)))
            await asyncio.sleep(0.3)
            await client.pause("abort")
            with pytest.raises(EngineAborted, match="aborted"):
                await running
            await client.resume()

            await client.pause()
            held = asyncio.create_task(client.generate([[2, 3]], Sampling(1)))
            await asyncio.sleep(0.3)
            assert not held.done()
            await client.resume()
            await held
            await client.flush_cache()

            assert (await client.model_info()).weight_version == "checkpoint"
            assert await client.tensor_parallel_size() == 1
            assert await client.checksum() == await client.checksum()
            await client.health()

    asyncio.run(run())


def cpu_seconds(engine: EngineAddress) -> float:
    """Return the CPU time of all processes of a server."""
    port = urlsplit(engine.url).port
    (server,) = {
        process
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def test_a_paused_engine_waits_for_requests_and_leaves_the_cores_alone(engine):
    """SGLang's own loop would use a core for as long as the pause lasts."""

    async def run() -> None:
        async with EngineClient(engine, timeout_s=60) as client:
            await client.pause("retract")
            try:
                before = cpu_seconds(engine)
                await asyncio.sleep(2.0)
                assert cpu_seconds(engine) - before < 0.7
                began = asyncio.get_running_loop().time()
                for _ in range(5):  # the scheduler itself answers; one that slept on would take a second for each
                    await client.checksum()
                assert asyncio.get_running_loop().time() - began < 3.0
            finally:
                await client.resume()

    asyncio.run(run())


def test_the_size_of_an_answer_is_far_below_its_limit(engine):
    """The limit must never refuse what SGLang writes: 57 bytes a token here, of which 21 are for the experts."""
    asked = Asked(5, 200, routing=RoutingShape(LAYERS, TOP_K, 4))
    request = {
        "input_ids": [PROMPTS[0]],
        "sampling_params": [Sampling(200).as_json(seed=1) | {"ignore_eos": True}],
        "return_logprob": True,
        "return_routed_experts": True,
    }
    with httpx.Client(trust_env=False, timeout=60, headers={"Accept-Encoding": "gzip"}) as http:
        answer = http.post(f"{engine.url}/generate", json=request)
    assert "Content-Encoding" not in answer.headers, "SGLang compresses nothing"
    assert len(answer.json()[0]["output_ids"]) == 200
    size, fixed = len(answer.content), asked.largest_bytes - RESPONSE_BYTES
    assert size < 0.5 * fixed, f"{size} bytes for 200 tokens, the limit without its fixed part is {fixed}"


def test_an_ordinary_server_prefers_nothing(engine):
    with EnginePool([engine], timeout_s=60) as pool:
        pool.check_preferences()


@pytest.mark.exhaustive
def test_preferred_sampling_parameters_change_nothing_and_are_refused(engine, checkpoint, tmp_path):
    """A request names every parameter; one that does not would be sampled otherwise."""
    preferred = {"temperature": 0.1}
    arguments = ["--preferred-sampling-params", json.dumps(preferred)]
    # the settings refuse this argument; a copy is not checked
    config = EngineConfig(max_running_requests=256).model_copy(update={"extra_args": arguments})
    seeds = list(range(len(PROMPTS)))
    with (
        sampler(engine, Sampling(20)) as plain,
        started(config, checkpoint, tmp_path, dtype="float32", gpu=False) as (other,),
    ):
        with sampler(other, Sampling(20)) as biased:
            ours = [[c.token_ids for c in group] for group in in_order(plain, PROMPTS, 4, seeds)]
            assert [[c.token_ids for c in group] for group in in_order(biased, PROMPTS, 4, seeds)] == ours
            with pytest.raises(EngineRefused, match=r"started with preferred_sampling_params = {'temperature': 0\.1"):
                biased.engines.check_preferences()
        short = {"input_ids": PROMPTS[0], "sampling_params": {"max_new_tokens": 40, "sampling_seed": 5}}
        with httpx.Client(trust_env=False, timeout=60) as http:
            texts = [http.post(f"{server.url}/generate", json=short).json()["output_ids"] for server in (engine, other)]
        assert texts[0] != texts[1], "what a request does not name, the server prefers"


def test_memory_calls_leave_a_server_that_generates_the_same(engine):
    """Without a GPU nothing is freed (SGLang's memory saver needs CUDA), but the calls are the same."""
    with sampler(engine, Sampling(6)) as engines:
        before = in_order(engines, PROMPTS, 2, list(range(len(PROMPTS))))
        for tags in (["kv_cache"], ["kv_cache", "weights"]):
            engines.engines.release_memory(tags)  # right after the last answer: it waits until the server is idle
            engines.engines.resume_memory(tags)
            after = in_order(engines, PROMPTS, 2, list(range(len(PROMPTS))))
            assert [[c.token_ids for c in g] for g in after] == [[c.token_ids for c in g] for g in before]
        with pytest.raises(EngineRefused, match="cannot release their memory"):
            engines.engines.require_memory_saver()


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


def call(arguments: str, name: str = "add") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "around", "arguments"),
    [
        (call('{"a": 17, "b": 25}'), "", [{"a": 17, "b": 25}]),
        ("\n".join(["I add.", call("{}"), call('{"a": 1}')]), "I add.", [{}, {"a": 1}]),
        ("The sum is 42.", "The sum is 42.", []),
        ("<tool_call>\n17 + 25\n</tool_call>", None, []),
        ("<tool_call>\n[17, 25]\n</tool_call>", None, []),
        ("I add. " + call('{"a": 17'), None, []),
        ("I add. " + call("{}", name="subtract"), None, []),
        ("<tool_call>\n", None, []),
    ],
    ids=["one", "two", "none", "no JSON", "another JSON", "cut JSON", "unknown tool", "cut"],
)
def test_tool_calls_are_found_by_the_engines_parser(engine, text, around, arguments):
    """What does not parse comes back as text, whole: the policy may write anything."""

    async def run():
        async with EngineClient(engine, timeout_s=60) as client:
            return await client.parse_tool_calls(text, [ADD], "qwen25")

    found, calls = asyncio.run(run())
    assert found == (text if around is None else around)
    assert [json.loads(found.arguments) for found in calls] == arguments
    assert [(found.name, found.id) for found in calls] == [("add", f"call_{i}") for i in range(len(arguments))]
    assert all(isinstance(found, ToolCall) for found in calls)


@pytest.mark.parametrize(
    ("tools", "parser"), [([ADD], "no_such_format"), ([{"name": "add"}], "qwen25")], ids=["parser", "tools"]
)
def test_an_unknown_parser_or_a_bad_description_is_an_error(engine, tools, parser):
    async def run():
        async with EngineClient(engine, timeout_s=60) as client:
            await client.parse_tool_calls(call("{}"), tools, parser)

    seen = (
        rf"cannot parse tool calls with rollout\.tool_call_parser = '{parser}' and the tools .*add.*parse_function_call"
    )
    with pytest.raises(EngineRefused, match=seen):
        asyncio.run(run())
