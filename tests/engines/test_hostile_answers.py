"""What an engine answers is not trusted: every damaged, false or huge answer ends in an error that names the server."""

import asyncio
import base64
import copy
import gzip
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.engines.answers import RESPONSE_BYTES, Asked, RoutingShape
from fiberpo_megatron.engines.client import EngineAddress, EngineClient, Sampling
from fiberpo_megatron.engines.errors import EngineAborted, EngineAnswerError, EngineRefused
from fiberpo_megatron.types import Completion
from tests.engines.fake_server import FakeServers, Pieces, response

URL = "http://10.0.0.7:1234"
PROMPT, TOKENS, VOCABULARY = [5, 6], [8, 9], 64
ROUTING = RoutingShape(layers=2, top_k=2, experts=4)
EXPERTS = (np.arange(3 * 2 * 2, dtype="<i4") % 4).tobytes()
GOOD = response(
    TOKENS,
    PROMPT,
    routed_experts=base64.b64encode(EXPERTS).decode(),
    input_token_logprobs=[[None, 5, None], [-1.5, 6, None]],
    weight_versions=[{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
)
CALLS = {
    "/generate": ([GOOD], lambda c: generate(c)),
    "score": (GOOD, lambda c: c.score(PROMPT)),
    "/model_info": ({"model_path": "/m", "weight_version": "3"}, lambda c: c.model_info()),
    "/server_info": (
        {"tp_size": 2, "dp_size": 1, "preferred_sampling_params": None},
        lambda c: c.tensor_parallel_size(),
    ),
    "preferences": ({"preferred_sampling_params": None}, lambda c: c.check_preferences()),
    "memory": ({"enable_memory_saver": True}, lambda c: c.memory_saver()),
    "/weights_checker": (
        {"success": True, "message": "ok", "ranks": [{"per_gpu_checksum": "ab"}]},
        lambda c: c.checksum(),
    ),
    "/parse_function_call": (
        {"normal_text": "I add.", "calls": [{"name": "add", "parameters": "{}"}]},
        lambda c: c.parse_tool_calls("text", [], "qwen25"),
    ),
    "/end_weight_update": ({"success": True, "message": "ok"}, lambda c: c.end_weight_update(5)),
}


def ask(answer: Any, call: Any) -> Any:
    """Return what a call makes of an answer: a value, or the content of a response with status 200, or a response."""

    def rule(host: str, body: Any) -> httpx.Response:
        if isinstance(answer, httpx.Response):
            return answer
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return httpx.Response(200, content=content)

    class Same(dict[str, Any]):
        def __contains__(self, path: object) -> bool:
            return True

        def __getitem__(self, path: str) -> Any:
            return rule

    async def run() -> Any:
        async with EngineClient(EngineAddress(URL), 5, transport=FakeServers(Same(any=rule))) as client:
            return await call(client)

    return asyncio.run(run())


def generate(client: EngineClient, **options: Any) -> Any:
    options = {"vocabulary": VOCABULARY, "routing": ROUTING} | options
    return client.generate([PROMPT], Sampling(4), seeds=[1], **options)


def check(result: Any) -> None:
    """What was let in is what the trainer may use."""
    if isinstance(result, list):
        (completion,) = result
        assert isinstance(completion, Completion)
        count = len(completion.token_ids)
        assert count <= 4 and all(type(t) is int and 0 <= t < VOCABULARY for t in completion.token_ids)
        assert completion.log_probs.shape == (count,) and np.isfinite(completion.log_probs).all()
        assert completion.finish_reason in ("stop", "length")
        assert [s.start for s in completion.weight_spans] == [0, *(s.end for s in completion.weight_spans)][:-1]
        assert completion.routed_experts is not None
        assert completion.routed_experts.shape == (1 + count, 2, 2)
        assert completion.routed_experts.min(initial=0) == 0
        assert completion.routed_experts.max(initial=0) < 4
    elif isinstance(result, np.ndarray):
        assert result.shape == (1,) and np.isfinite(result).all()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.sampled_from([0, -1, 2**31, 10**400, -(10**300), VOCABULARY, VOCABULARY - 1]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["\x1b[2J", "\u2028", "\ud800", "1.5", "8", "", "abort", "length", "x" * 5000]),
    st.lists(st.one_of(st.none(), st.integers(-5, 70), st.floats(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.sampled_from(["type", "message", "version", "start", "end"]), st.integers(-3, 3), max_size=3),
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, Any]:
    """A call, and its good answer with one to three parts replaced, removed or repeated."""
    name = draw(st.sampled_from(sorted(CALLS)))
    answer = copy.deepcopy(CALLS[name][0])
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(answer))))
        if not path:
            answer = draw(st.one_of(HOSTILE, st.just([answer]), st.just([answer, answer])))
            continue
        holder = answer
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if how == "replace":
            holder[path[-1]] = draw(HOSTILE)
        elif how == "remove":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
    return name, answer


def accepted(name: str, answer: Any) -> None:
    """Either the answer is refused by one error that names the server, or what it says can be used."""
    try:
        check(ask(answer, CALLS[name][1]))
    except (EngineAnswerError, EngineAborted, EngineRefused) as error:
        message = str(error)
        assert message.startswith(f"engine {URL}: ") and len(message) < 4000
        assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", CALLS)
def test_the_good_answers_are_good(name):
    check(ask(*CALLS[name]))


@settings(max_examples=150, deadline=None)
@given(damaged())
def test_a_damaged_answer_is_refused_or_harmless(case):
    accepted(*case)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CALLS)), st.integers(0, 400), st.integers(0, 400), st.binary(max_size=8))
def test_damaged_bytes_are_refused_or_harmless(name, start, length, put):
    good = json.dumps(CALLS[name][0]).encode()
    accepted(name, good[:start] + put + good[start + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 1}, "answers a prompt of 1 tokens, but 2 were sent"),
        ({"finish_reason": {"type": "tired"}}, "the finish reason is tired; known are stop, length"),
        ({"output_token_logprobs": [["-0.5", 8, None], [-0.5, 9, None]]}, r"entries are not \[number"),
        ({"output_token_logprobs": [[-1e300, 8, None], [-0.5, 9, None]]}, r"position 0 is -1e\+300"),
        ({"output_token_logprobs": [[10**400, 8, None], [-0.5, 9, None]]}, "token 8 at position 0 is 1000"),
        ({"output_token_logprobs": [[True, 8, None], [-0.5, 9, None]]}, r"entries are not \[number"),
        ({"output_token_logprobs": [{"0": 1}, [-0.5, 9, None]]}, r"entries are not \[number"),
        (
            {"weight_versions": [{"version": "1", "start": 0, "end": 5}, {"version": "1", "start": 5, "end": 2}]},
            "do not cover the 2",
        ),
        (
            {"routed_experts": base64.b64encode(np.full(12, 4, "<i4").tobytes()).decode()},
            "names experts 4 .. 4, but a layer has 4",
        ),
        ({"routed_experts": base64.b64encode(np.full(12, -1, "<i4").tobytes()).decode()}, "names experts -1 .. -1"),
        ({"routed_experts": "\u00e9"}, "bad answer to /generate"),
    ],
)
def test_a_false_part_is_named(changes, message):
    answer = copy.deepcopy(GOOD)
    answer["meta_info"] |= changes
    with pytest.raises(EngineAnswerError, match=message):
        ask([answer], generate)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([8, VOCABULARY], r"response token 1 is 64; the vocabulary is 0 \.\. 63"),
        ([8, -1], "response token 1 is -1"),
        ([8, "9"], "response token 1 is 9"),
        ([8, 9.0], r"response token 1 is 9\.0"),
        ([8, True], "response token 1 is True"),
        ([1, 2, 3, 4, 5], "it has 5 response tokens, but at most 4 were asked for"),
    ],
)
def test_response_tokens_are_tokens_of_the_model(tokens, message):
    answer = response(tokens, PROMPT, routed_experts=GOOD["meta_info"]["routed_experts"])
    with pytest.raises(EngineAnswerError, match=message):
        ask([answer], generate)


# ---- size ----


def test_the_limit_follows_from_the_request():
    one = Asked(prompt_tokens=100, max_response_tokens=1000)
    assert RESPONSE_BYTES < one.largest_bytes < RESPONSE_BYTES + 300_000
    routed = Asked(100, 1000, routing=RoutingShape(48, 8, 128))
    assert routed.largest_bytes - one.largest_bytes == 6 * 1100 * 48 * 8


def test_a_usual_answer_is_far_below_the_limit():
    """The worst that SGLang writes: long ids, all digits of the log-probs, other weights for every token."""
    count = 1000
    tokens = list(range(150_000, 150_000 + count))
    entries = [[-12.345678901234567, token, None] for token in tokens]
    spans = [{"version": "1000000", "start": i, "end": i + 1} for i in range(count)]
    answer = response(tokens, list(range(100)), output_token_logprobs=entries, weight_versions=spans)
    assert len(json.dumps([answer])) < 0.7 * Asked(100, count).largest_bytes


@pytest.mark.parametrize("announced", [True, False])
def test_an_answer_above_the_limit_is_refused_before_it_is_read(announced):
    size = 50 << 20
    pieces = Pieces(b" " * size, size=1 << 16)
    headers = {"Content-Length": str(size)} if announced else {}
    answer = httpx.Response(200, headers=headers, stream=pieces)
    limit = Asked(2, 4, routing=ROUTING).largest_bytes
    with pytest.raises(EngineAnswerError, match=rf"it has {size if announced else '1310'}\d* bytes.*{limit} at most"):
        ask(answer, generate)
    assert pieces.read <= limit + (1 << 16)


def test_an_endless_error_is_cut():
    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield b"\x1b[31merror " * 1000

    with pytest.raises(EngineRefused, match=r"HTTP 500: \\x1b\[31merror") as raised:
        ask(httpx.Response(500, stream=Endless()), generate)
    assert len(str(raised.value)) < 1500 and str(raised.value).isprintable()


def test_a_compressed_answer_is_refused_unopened():
    bomb = gzip.compress(b" " * (20 << 20) + b"[]")
    headers = {"Content-Encoding": "gzip"}
    with pytest.raises(EngineAnswerError, match=r"it is compressed \(gzip\), although the request forbids that"):
        ask(httpx.Response(200, headers=headers, stream=Pieces(bomb)), generate)


def test_requests_forbid_compression():
    seen = []

    class Servers(FakeServers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(request.headers["Accept-Encoding"])
            return await super().handle_async_request(request)

    async def run() -> None:
        async with EngineClient(EngineAddress(URL), 5, transport=Servers()) as client:
            await client.generate([PROMPT], Sampling(4))

    asyncio.run(run())
    assert seen == ["identity"]


@pytest.mark.parametrize(
    "bomb", [b"[" * 60_000, b'{"a":' * 10_000, b"[" + b"1" * 5000 + b"]"], ids=["[", "{", "digits"]
)
def test_json_bombs_are_refused(bomb):
    with pytest.raises(EngineAnswerError, match="bad answer to /generate: "):
        ask(bomb, generate)
    with pytest.raises(EngineRefused, match="HTTP 400: "):
        ask(httpx.Response(400, content=bomb), generate)


# ---- a server that changes what requests ask for ----


@pytest.mark.parametrize(
    "changes",
    [
        {"preferred_sampling_params": {"repetition_penalty": 1.2}},
        {"watermark_default_enabled": True},
        {"speculative_accept_threshold_single": 0.7},
        {"allow_auto_truncate": True},
    ],
)
def test_a_server_with_preferences_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(EngineRefused, match=rf"{URL}: it was started with {name} = .*Start it without"):
        ask({"tp_size": 1} | changes, lambda c: c.check_preferences())


def test_a_server_without_preferences_is_taken():
    ask({"speculative_accept_threshold_single": 1, "preferred_sampling_params": {}}, lambda c: c.check_preferences())
