"""The client against a fake server: what is sent, what is read, and that every failure is typed and named."""

import asyncio
import base64
from pathlib import Path

import httpx
import numpy as np
import pytest

from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.client import NEUTRAL, EngineAddress, EngineClient, Sampling
from fiberpo_megatron.engines.errors import (
    EngineAborted,
    EngineAnswerError,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
)
from fiberpo_megatron.types import WeightSpan
from tests.engines.fake_server import FakeServers, response

URL = "http://10.0.0.7:1234"


def ask(transport: httpx.AsyncBaseTransport, call, timeout_s: float = 5.0, log: Path | None = None):
    async def run():
        async with EngineClient(EngineAddress(URL, log), timeout_s, transport=transport) as client:
            return await call(client)

    return asyncio.run(run())


def generate(client: EngineClient, **options):
    return client.generate([[5, 6]], Sampling(4, stop_token_ids=(9,), temperature=0.7, top_p=0.9), **options)


def answering(*changes, **more):
    """A server whose one response has these changes."""

    def answer(host, body):
        element = response([8, 9], [5, 6], **dict(*changes, **more))
        return [element] if isinstance(body["input_ids"][0], list) else element

    return FakeServers({"/generate": answer})


def test_request_and_response():
    servers = answering(
        finish_reason={"type": "stop", "matched": 9},
        weight_versions=[{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
    )
    (completion,) = ask(servers, lambda c: generate(c, seeds=[77]))
    (_, path, body) = servers.calls[0]
    assert path == "/generate" and body == {
        "input_ids": [[5, 6]],
        "sampling_params": [
            {
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": -1,
                "max_new_tokens": 4,
                "stop_token_ids": [9],
                "sampling_seed": 77,
                **NEUTRAL,
            }
        ],
        "return_logprob": True,
        "stream": False,
    }
    assert completion.token_ids == (8, 9) and completion.finish_reason == "stop"
    np.testing.assert_array_equal(completion.log_probs, np.float32([-0.5, -1.0]))
    assert completion.weight_spans == (WeightSpan("3", 0, 1), WeightSpan("4", 1, 2))
    assert completion.routed_experts is None


def test_routed_experts_are_decoded():
    experts = np.arange(3 * 2 * 2, dtype="<i4").reshape(3, 2, 2)
    servers = answering(routed_experts=base64.b64encode(experts.tobytes()).decode())
    (completion,) = ask(servers, lambda c: generate(c, routing=RoutingShape(2, 2, 12)))
    np.testing.assert_array_equal(completion.routed_experts, experts)
    assert servers.calls[0][2]["return_routed_experts"] is True
    with pytest.raises(EngineAnswerError, match=r"48 bytes, 72 were expected for 3 positions x 3 layers x top-2"):
        ask(servers, lambda c: generate(c, routing=RoutingShape(3, 2, 12)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_token_logprobs": None}, "lacks the field 'output_token_logprobs'"),
        ({"output_token_logprobs": [[-0.5, 8, None]]}, r"log-probs of 1 tokens \[8\] came for 2"),
        ({"output_token_logprobs": [[-0.5, 8, None], [-0.5, 7, None]]}, r"log-probs of 2 tokens \[8, 7\]"),
        ({"output_token_logprobs": [[-0.5, 8, None], [None, 9, None]]}, "entries are not"),
        ({"output_token_logprobs": [[-0.5, 8, None], [float("nan"), 9, None]]}, "token 9 at position 1 is nan"),
        ({"output_token_logprobs": [[-0.5, 8, None], [0.3, 9, None]]}, "position 1 is 0.3"),
        ({"weight_versions": None}, "lacks the field 'weight_versions'"),
        ({"weight_versions": [{"version": "1", "start": 0, "end": 1}]}, "do not cover the 2"),
        ({"finish_reason": None}, "lacks the field 'finish_reason'"),
        ({"finish_reason": "stop"}, "field 'finish_reason' of the answer is stop \\(str\\)"),
    ],
)
def test_a_response_that_does_not_fit_is_refused(changes, message):
    body = b"".join(
        httpx.Response(200, content=_json([response([8, 9], [5, 6], **changes)])).iter_bytes()
    )  # json with NaN, as orjson would never write it but a broken server might
    servers = FakeServers({"/generate": lambda host, _: httpx.Response(200, content=body)})
    with pytest.raises(EngineAnswerError, match=message) as raised:
        ask(servers, generate)
    assert URL in str(raised.value)


def _json(value: object) -> bytes:
    import json

    return json.dumps(value).encode()


def test_the_number_of_responses_must_fit():
    servers = FakeServers({"/generate": lambda host, body: [response([8], [5])] * 2})
    with pytest.raises(EngineAnswerError, match="1 responses were asked for, but 2 came"):
        ask(servers, generate)


def test_an_aborted_response_is_an_error(tmp_path):
    log = tmp_path / "engine_0.log"
    log.write_text("one\ntwo\n")
    servers = answering(finish_reason={"type": "abort", "message": "by hand"})
    with pytest.raises(EngineAborted, match=r"aborted \(by hand\)[\s\S]*engine_0.log ---\none\ntwo"):
        ask(servers, generate, log=log)
    with pytest.raises(EngineAborted, match=r"aborted \(by hand\)"):
        ask(servers, lambda c: c.score([5, 6]))


def test_scores():
    entries = [[None, 5, None], [-1.5, 6, None], [-2.0, 7, None]]
    servers = FakeServers(
        {"/generate": lambda host, body: response([], body["input_ids"], input_token_logprobs=entries)}
    )
    np.testing.assert_array_equal(ask(servers, lambda c: c.score([5, 6, 7])), np.float32([-1.5, -2.0]))
    sent = servers.calls[0][2]
    assert sent["sampling_params"] == Sampling(0).as_json() and sent["logprob_start_len"] == 0
    with pytest.raises(EngineAnswerError, match="2 tokens were to be scored, but the answer has log-probs for 3"):
        ask(servers, lambda c: c.score([5, 6]))


def test_an_http_error_carries_the_servers_reason():
    reason = {"error": {"message": "input is too long"}}
    servers = FakeServers({"/generate": lambda host, body: httpx.Response(400, json=reason)})
    with pytest.raises(EngineRefused, match=rf"{URL}: /generate was refused: HTTP 400: input is too long"):
        ask(servers, generate)
    servers = FakeServers({"/end_weight_update": lambda host, body: {"success": False, "message": "no session"}})
    with pytest.raises(EngineRefused, match="/end_weight_update was refused: no session"):
        ask(servers, lambda c: c.end_weight_update(1))
    servers = FakeServers({"/model_info": lambda host, body: httpx.Response(200, content=b"<html>")})
    with pytest.raises(EngineAnswerError, match="bad answer to /model_info"):
        ask(servers, lambda c: c.model_info())


def test_a_deadline_names_the_server():
    servers = FakeServers(delay_s=30)
    with pytest.raises(EngineTimeout, match=rf"{URL}: no answer to POST /generate within 0.05 s"):
        ask(servers, generate, timeout_s=0.05)


def test_refused_and_lost_connections():
    def fail(error):
        def rule(host, body):
            raise error

        return FakeServers({"/generate": rule})

    with pytest.raises(EngineUnreachable, match="no connection"):
        ask(fail(httpx.ConnectError("refused")), generate)
    with pytest.raises(EngineUnreachable, match=r"connection was lost during POST /generate .*disconnected"):
        ask(fail(httpx.RemoteProtocolError("disconnected")), generate)


def test_a_port_nobody_listens_on():
    async def run():
        async with EngineClient(EngineAddress("http://127.0.0.1:9"), 5) as client:
            await client.generate([[5]], Sampling(1))

    with pytest.raises(EngineUnreachable, match="http://127.0.0.1:9"):
        asyncio.run(run())


def test_seeds_and_prompts_must_fit():
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        ask(FakeServers(), lambda c: generate(c, seeds=[1, 2]))


def test_data_parallel_servers_are_refused():
    servers = FakeServers({"/server_info": lambda host, body: {"tp_size": 2, "dp_size": 2}})
    with pytest.raises(EngineAnswerError, match="dp_size > 1"):
        ask(servers, lambda c: c.tensor_parallel_size())
    servers = FakeServers({"/server_info": lambda host, body: {"tp_size": 2, "dp_size": 1}})
    assert ask(servers, lambda c: c.tensor_parallel_size()) == 2
