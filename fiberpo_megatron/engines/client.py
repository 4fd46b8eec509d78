"""This is an async HTTP client for one SGLang server; every call has a deadline and fails with an `EngineError`.

There are no retries: a failed generation is reported, and a weight update must never run twice unnoticed. What a server
answers is not trusted: it is read up to a size that follows from the request, and `answers.py` checks it.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.engines import answers
from fiberpo_megatron.engines.answers import CONTROL_BYTES, RESPONSE_BYTES, Asked, RoutingShape
from fiberpo_megatron.engines.errors import (
    EngineAborted,
    EngineAnswerError,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
)
from fiberpo_megatron.engines.urls import checked_url
from fiberpo_megatron.environments import ToolCall
from fiberpo_megatron.types import Completion

CONTROL_TIMEOUT_S = 60.0
TRACE_TIMEOUT_S = 300.0
"""A server writes a trace of some hundred megabytes while it does nothing else."""
_CLOSE = {"Connection": "close"}
"""For calls that a server may fail: it then drops the connection without having announced it."""
KEY_FIX = "Name the file with the servers' key in {section}.api_key_file"
KEEP_ALIVE_S = 3.0
"""Idle connections are dropped sooner than a server drops them (5 s, or `command.SERVER_KEEP_ALIVE_S`): none is used
while it closes."""


@dataclass(frozen=True)
class EngineAddress:
    """Says where a server is, and where its log is if this machine can read it. Raises ValueError for a url that is no
    address of a server."""

    url: str
    """http://host:port"""
    log: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    """Sent with every request (`Authorization: Bearer`); never shown."""
    section: str = "rollout.engine"
    """Section of the config that names the server, for messages."""

    def __post_init__(self) -> None:
        checked_url(self.url)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def key_fix(self) -> str:
        """Say where the key of the server is named."""
        return KEY_FIX.format(section=self.section)


NEUTRAL: dict[str, object] = {
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "n": 1,
    "beam_width": None,
    "logit_bias": None,
    "watermark": None,
    "custom_params": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "stop": None,
    "stop_regex": None,
    "ignore_eos": False,
    "no_stop_trim": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stream_interval": None,
}
"""Sampling parameters that a run does not use, with the values that change nothing."""


@dataclass(frozen=True)
class Sampling:
    """Says how responses are drawn. Log-probs are those of logits / temperature, before top_p and top_k."""

    max_response_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; the token that ended it stays in it. The model's own EOS ends a response as well."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: all tokens."""

    def as_json(self, seed: int | None = None) -> dict[str, object]:
        """Return every sampling parameter that SGLang has, so that no default of a server's takes part.

        A parameter that a request does not name is taken from a server's --preferred-sampling-params.
        """
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_new_tokens": self.max_response_tokens,
            "stop_token_ids": list(self.stop_token_ids),
            "sampling_seed": seed,
            **NEUTRAL,
        }


@dataclass(frozen=True)
class ModelInfo:
    """Holds what a server says about itself."""

    model_path: str
    weight_version: str
    """Version of the last publication; `default` before the first."""


class EngineClient:
    """Talks to one server. Use it inside one event loop, and close it (`async with`).

    `timeout_s` bounds one generation or scoring request, including its wait in the server's queue; `transport` replaces
    the network in tests.
    """

    def __init__(
        self,
        address: EngineAddress,
        timeout_s: float,
        max_connections: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.address = address
        self.url = address.url.rstrip("/")
        self.timeout_s = timeout_s
        limits = httpx.Limits(max_connections=max_connections, keepalive_expiry=KEEP_ALIVE_S)
        # trust_env=False: a proxy of the environment must not stand between trainer and engines
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={
                **address.headers,
                "Accept-Encoding": "identity",
            },  # a small answer must not unfold into a large one
            timeout=None,
            limits=limits,
            trust_env=False,
            transport=transport,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Generation

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        vocabulary: int | None = None,
        routing: RoutingShape | None = None,
    ) -> list[Completion]:
        """Return one response to each prompt (token ids), in order; for several responses, repeat the prompt.

        SGLang's `n` is not used, because its responses would share one seed. `seeds`: one per prompt; this needs a
        server started with `--enable-deterministic-inference`. `vocabulary`: a response with a token that is not below
        it is refused. `routing`: the shape in which experts are asked for; it fills `Completion.routed_experts`, and
        needs `--enable-return-routed-experts`. Raises EngineAnswerError for an answer that does not fit the request.
        """
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; pass one seed per prompt")
        seed_of: Sequence[int | None] = [None] * len(prompts) if seeds is None else seeds
        request: dict[str, object] = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": [sampling.as_json(seed) for seed in seed_of],
            "return_logprob": True,
            "stream": False,
        }
        if routing is not None:
            request["return_routed_experts"] = True
        asked = [Asked(len(prompt), sampling.max_response_tokens, vocabulary, routing) for prompt in prompts]
        limit = sum(one.largest_bytes for one in asked)
        answer = await self._call("POST", "/generate", request, self.timeout_s, limit)
        with self._answer_errors("/generate"):
            found = len(answer) if isinstance(answer, list) else 1
            if not isinstance(answer, list) or found != len(prompts):
                raise ValueError(f"{len(prompts)} responses were asked for, but {found} came")
            for element in answer:
                self._refuse_abort(element)
            return [answers.completion(element, one) for element, one in zip(answer, asked)]

    async def score(self, token_ids: Sequence[int], first: int = 1) -> NDArray[np.float32]:
        """Return the [len - first] log-probs of token_ids[first:] at temperature 1 (SGLang scores prompts at no other).

        Trajectories of one prompt share its work in the server's cache where `first` lies behind the prompt.
        """
        if not 1 <= first < len(token_ids):
            raise ValueError(f"tokens from {first} on are to be scored, but a text of {len(token_ids)} tokens has none")
        request = {
            "input_ids": list(token_ids),
            "sampling_params": Sampling(0).as_json(),
            "return_logprob": True,
            "logprob_start_len": first - 1,
            "stream": False,
        }
        answer = await self._call("POST", "/generate", request, self.timeout_s, Asked(len(token_ids), 0).largest_bytes)
        with self._answer_errors("/generate"):
            self._refuse_abort(answer)
            return answers.prompt_log_probs(answer, token_ids, first)

    async def check_token(self, token: int) -> None:
        """Raise EngineRefused, with the server's words, when `token` is not in the vocabulary of its model."""
        request = {
            "input_ids": [0],
            "sampling_params": Sampling(0).as_json(),
            "return_logprob": True,
            "token_ids_logprob": [token],
            "stream": False,
        }
        await self._call("POST", "/generate", request, self.timeout_s, json=False)

    async def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token alone, special tokens included. Raises EngineRefused when the server has no
        tokenizer (`--skip-tokenizer-init`)."""
        request = {"tokens": [[token] for token in token_ids], "skip_special_tokens": False}
        answer = await self._call("POST", "/v1/detokenize", request, CONTROL_TIMEOUT_S)
        with self._answer_errors("/v1/detokenize"):
            return answers.texts(answer, len(token_ids))

    def _refuse_abort(self, answer: object) -> None:
        reason = answers.abort_message(answer)
        if reason is not None:
            raise EngineAborted(
                self.url,
                f"a response was aborted ({reason})",
                "If it was not aborted on purpose, look for the cause in the server's log",
                self.address.log,
            )

    async def parse_tool_calls(
        self, text: str, tools: Sequence[Mapping[str, Any]], parser: str
    ) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the text around the tool calls in `text`, and the calls. `parser` is SGLang's name of the format.

        A text that does not parse is returned whole, without calls: the policy may write anything. Raises EngineRefused
        when the server does not know the parser, or cannot read the descriptions of the tools.
        """
        request = {"text": text, "tools": list(tools), "tool_call_parser": parser}
        try:
            answer = await self._parse(request)
        except EngineRefused:
            await self._check_parser(request)
            return text, ()
        with self._answer_errors("/parse_function_call"):
            around, calls = answers.tool_calls(answer)
            return (around, calls) if calls else (text, ())

    async def _check_parser(self, request: Mapping[str, object]) -> None:
        """Raise EngineRefused when a parser cannot even read an empty text.

        SGLang gives the same answer (500) when it does not know a parser and when a parser fails on a text.
        """
        try:
            await self._parse({**request, "text": ""})
        except EngineRefused as error:
            raise EngineRefused(
                self.url,
                f"it cannot parse tool calls with rollout.tool_call_parser = {request['tool_call_parser']!r} and the "
                f"tools {answers.short(request['tools'], 300)} ({error.what})",
                "Name a parser of this SGLang, and describe each tool as OpenAI's API does",
                self.address.log,
            ) from error

    async def _parse(self, request: Mapping[str, object]) -> Any:
        """Call SGLang's parser on a connection of its own.

        When the parser fails, the server answers 500 and then drops the connection without having announced it. Another
        request that reuses the connection at that moment would be lost.
        """
        path = "/parse_function_call"
        limit = RESPONSE_BYTES + 12 * len(str(request["text"]))  # JSON in JSON writes a character with 12 at most
        return await self._call("POST", path, request, CONTROL_TIMEOUT_S, limit, headers={"Connection": "close"})

    # Control

    async def health(self, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Return once the server has generated one token (which takes a second when it is idle)."""
        await self._call("GET", "/health_generate", None, timeout_s, json=False)

    async def model_info(self, timeout_s: float = CONTROL_TIMEOUT_S) -> ModelInfo:
        answer = await self._call("GET", "/model_info", None, timeout_s)
        with self._answer_errors("/model_info"):
            return ModelInfo(answers.field(answer, "model_path", str), answers.field(answer, "weight_version", str))

    async def load(self, timeout_s: float) -> answers.EngineLoad:
        """Return how many requests the server has, and how full its KV cache is."""
        answer = await self._call("GET", "/v1/loads?include=core", None, timeout_s)
        with self._answer_errors("/v1/loads"):
            return answers.load(answer)

    async def tensor_parallel_size(self, timeout_s: float = CONTROL_TIMEOUT_S) -> int:
        """Return the number of ranks among which the server splits its weights.

        A server with data-parallel replicas is refused, because SGLang cannot update those by broadcast.
        """
        answer = await self._call("GET", "/server_info", None, timeout_s)
        with self._answer_errors("/server_info"):
            return answers.parallel_size(answer)

    async def check_preferences(self) -> None:
        """Raise EngineRefused when the server was started with arguments that change what requests ask for.

        Requests name every sampling parameter, but a watermark, for example, does not depend on them.
        """
        answer = await self._call("GET", "/server_info", None, CONTROL_TIMEOUT_S)
        with self._answer_errors("/server_info"):
            found = answers.preferences(answer)
        if found:
            raise EngineRefused(
                self.url,
                f"it was started with {', '.join(found)}, so that its tokens or prompts may not be those asked for",
                "Start it without these arguments; [rollout] says how to sample",
            )

    async def pause(self, mode: Literal["abort", "retract", "in_place"] = "retract") -> None:
        """Stop generating. `retract` puts running requests back into the queue; new ones queue."""
        await self._call("POST", "/pause_generation", {"mode": mode}, CONTROL_TIMEOUT_S)

    async def resume(self) -> None:
        await self._call("POST", "/continue_generation", {}, CONTROL_TIMEOUT_S)

    async def flush_cache(self) -> None:
        """Drop the KV cache of finished requests. Refused while requests run, unless they were retracted."""
        await self._call("POST", "/flush_cache", None, CONTROL_TIMEOUT_S, json=False)

    async def memory_saver(self) -> bool:
        """Return whether the server was started with --enable-memory-saver, so that releasing memory frees any."""
        answer = await self._call("GET", "/server_info", None, CONTROL_TIMEOUT_S)
        with self._answer_errors("/server_info"):
            return bool(answers.field(answer, "enable_memory_saver", bool))

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Release the memory of "kv_cache" or "weights" with its contents; no requests may come until it is resumed.

        A server that is not idle would crash, so this waits until the last request has left, and raises EngineRefused
        if it does not.
        """
        idle = CONTROL_TIMEOUT_S / 2
        await self._call("POST", f"/flush_cache?timeout={idle:g}", None, CONTROL_TIMEOUT_S, json=False)
        await self._call("POST", "/release_memory_occupation", {"tags": list(tags)}, CONTROL_TIMEOUT_S, json=False)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take the memory again; weights must then be published."""
        await self._call("POST", "/resume_memory_occupation", {"tags": list(tags)}, CONTROL_TIMEOUT_S, json=False)

    async def checksum(self) -> str:
        """Return the checksum of the weights that the server holds, joined over its tensor-parallel ranks."""
        answer = await self._command("/weights_checker", {"action": "checksum"}, CONTROL_TIMEOUT_S)
        with self._answer_errors("/weights_checker"):
            return answers.checksum(answer)

    async def start_profile(self, folder: Path, name: str, passes: int) -> None:
        """Have the server record its next `passes` forward passes with torch's profiler.

        It then writes <folder>/<name>-TP-0.trace.json.gz, and one more file for each of its further ranks, or does so
        when `stop_profile` comes first. `folder` is a path on the server's machine.
        """
        request: dict[str, object] = {
            "output_dir": str(folder),
            "profile_id": name,
            "num_steps": passes,
            "activities": ["CPU", "GPU"],
            "with_stack": False,  # with stacks a second of decoding is hundreds of megabytes
            "record_shapes": False,
        }
        await self._call("POST", "/start_profile", request, TRACE_TIMEOUT_S, json=False, headers=_CLOSE)

    async def stop_profile(self) -> None:
        """End the recording; the trace is written when this returns. Raises EngineRefused when none runs any more."""
        await self._call("POST", "/stop_profile", None, TRACE_TIMEOUT_S, json=False, headers=_CLOSE)

    # Weights

    async def update_weights_from_disk(self, folder: Path, version: str, timeout_s: float) -> None:
        """Load the safetensors of `folder` (a path on the server's machine) in place.

        A folder that cannot be read leaves the old weights. A tensor of the wrong shape kills the server: its
        rollback reads the same folder.
        """
        # without load_format, a server that was started with random weights would draw random ones again
        request = {"model_path": str(folder), "weight_version": version, "load_format": "auto"}
        await self._command("/update_weights_from_disk", request, timeout_s)

    async def begin_weight_update(self, timeout_s: float) -> None:
        await self._command("/begin_weight_update", {"selector": "all"}, timeout_s)

    async def end_weight_update(self, timeout_s: float) -> None:
        await self._command("/end_weight_update", {}, timeout_s)

    async def init_weights_update_group(
        self,
        host: str,
        port: int,
        rank_offset: int,
        world_size: int,
        group: str,
        backend: str,
        timeout_s: float,
    ) -> None:
        """Make the server's tensor-parallel ranks join `group` as ranks rank_offset, rank_offset + 1, ..."""
        request = {
            "master_address": host,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._command("/init_weights_update_group", request, timeout_s)

    async def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        version: str | None,
        timeout_s: float,
    ) -> None:
        """Make the server receive one flat bucket of these tensors from rank 0 of `group` and load it.

        `version` is given with the last bucket.
        """
        request: dict[str, object] = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": version is not None,
        }
        if version is not None:
            request["weight_version"] = version
        await self._command("/update_weights_from_distributed", request, timeout_s)

    async def destroy_weights_update_group(self, group: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        await self._command("/destroy_weights_update_group", {"group_name": group}, timeout_s)

    # Transport

    async def _command(self, path: str, request: Mapping[str, object], timeout_s: float) -> Any:
        """Send a request whose answer carries `success`."""
        answer = await self._call("POST", path, request, timeout_s)
        with self._answer_errors(path):
            if not answers.field(answer, "success", bool):
                raise self._refused(path, answers.short(answer.get("message", answer), 1000))
        return answer

    async def _call(
        self,
        method: str,
        path: str,
        request: Mapping[str, object] | None,
        timeout_s: float,
        limit: int = CONTROL_BYTES,
        json: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Return the decoded answer of one request, which may have `limit` bytes.

        Raises EngineError when there is none before the deadline, or none that can be used.
        """
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream(method, path, json=request, headers=headers) as response,
            ):
                fine = response.status_code == httpx.codes.OK
                body, size = await _read(response, limit if fine else RESPONSE_BYTES)
        except TimeoutError as error:
            raise EngineTimeout(
                self.url,
                f"no answer to {method} {path} within {timeout_s:g} s",
                "It hangs or is overloaded: see its log, lower the concurrency or raise the timeout",
                self.address.log,
            ) from error
        except httpx.ConnectError as error:
            raise EngineUnreachable(
                self.url,
                f"{method} {path}: no connection ({error})",
                "Check that the server runs and that the address is right",
                self.address.log,
            ) from error
        except httpx.TransportError as error:
            raise EngineUnreachable(
                self.url,
                f"the connection was lost during {method} {path} ({type(error).__name__}: {error})",
                "The server died or was stopped: see its log",
                self.address.log,
            ) from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            what = f"{path} was refused: {_key_seen(self.address)}"
            raise EngineRefused(self.url, what, self.address.key_fix)
        if not fine:
            raise self._refused(path, f"HTTP {response.status_code}: {_reason(body)}")
        with self._answer_errors(path):
            if size > limit:
                raise ValueError(f"it has {size} bytes or more, but an answer to this request has {limit} at most")
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise ValueError(f"it is compressed ({answers.short(encoding)}), although the request forbids that")
            return answers.parsed(body) if json else None

    def _refused(self, path: str, reason: str) -> EngineRefused:
        return EngineRefused(self.url, f"{path} was refused: {reason:.1000}", "See the server's log")

    @contextmanager
    def _answer_errors(self, path: str) -> Iterator[None]:
        """Turns a ValueError about an answer into an EngineAnswerError that names the server."""
        try:
            yield
        except ValueError as error:
            what = f"bad answer to {path}: {error}"
            raise EngineAnswerError(self.url, what, "Check that it is an SGLang server of a tested version") from error


def _key_seen(address: EngineAddress) -> str:
    return "another API key is needed" if address.api_key else "an API key is needed, but none was given"


async def _read(response: httpx.Response, limit: int) -> tuple[bytearray, int]:
    """Return the answer's bytes as they were sent and how many were announced or seen; above `limit` it is cut off."""
    announced = response.headers.get("Content-Length", "")
    size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    body = bytearray()
    if size <= limit or response.status_code != httpx.codes.OK:
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                break
    return body[: limit + 1], max(size, len(body))


def _reason(body: bytearray) -> str:
    """Return the message inside SGLang's error bodies, or the whole body, without control characters."""
    try:
        found = answers.parsed(body)
    except ValueError:
        return answers.short(body.decode(errors="replace"), 1000) or "no body"
    inner = found.get("error", found) if isinstance(found, dict) else found
    return answers.short(inner.get("message", inner) if isinstance(inner, dict) else inner, 1000)
