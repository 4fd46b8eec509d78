"""This is an async HTTP client for one SGLang server; every call has a deadline and fails with an `EngineError`.

`connection.py` sends the requests, `weight_calls.py` has the calls that change weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.engines import answers
from fiberpo_megatron.engines.answers import RESPONSE_BYTES, Asked, RoutingShape
from fiberpo_megatron.engines.connection import CONTROL_TIMEOUT_S, EngineAddress
from fiberpo_megatron.engines.errors import EngineAborted, EngineRefused
from fiberpo_megatron.engines.known_faults import known_faults
from fiberpo_megatron.engines.weight_calls import WeightCalls
from fiberpo_megatron.environments import ToolCall
from fiberpo_megatron.types import Completion

__all__ = ["EngineAddress", "EngineClient", "ModelInfo", "Sampling"]

TRACE_TIMEOUT_S = 300.0
"""A server writes a trace of some hundred megabytes while it does nothing else."""
_CLOSE = {"Connection": "close"}
"""For calls that a server may fail: it then drops the connection without having announced it."""
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


class EngineClient(WeightCalls):
    """Talks to one server. Use it inside one event loop, and close it (`async with`).

    `timeout_s` bounds one generation or scoring request, including its wait in the server's queue; `transport` replaces
    the network in tests.
    """

    # Generation

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
        """Return one response to each prompt (token ids), in order; for several responses, repeat the prompt.

        SGLang's `n` is not used, because its responses would share one seed. `seeds`: one per prompt; this needs a
        server started with `--enable-deterministic-inference`. `vocabulary`: a response with a token that is not below
        it is refused. `routing`: the shape in which experts are asked for; it fills `Completion.routed_experts`, and
        needs `--enable-return-routed-experts`. `known_routes`: the server sends the experts of the positions from this
        one of the prompts on. `keep_aborted`: is asked about a response that the engine aborted; where
        it says True the response is returned with the tokens that it had, perhaps none, and the finish reason "abort".
        Raises EngineAborted for other aborts, and EngineAnswerError for an answer that does not fit the request.
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
            request |= {"return_routed_experts": True, "routed_experts_start_len": known_routes}
        asked = [
            Asked(len(prompt), sampling.max_response_tokens, vocabulary, routing, known_routes) for prompt in prompts
        ]
        limit = sum(one.largest_bytes for one in asked)
        answer = await self._call("POST", "/generate", request, self.timeout_s, limit)
        with self._answer_errors("/generate"):
            found = len(answer) if isinstance(answer, list) else 1
            if not isinstance(answer, list) or found != len(prompts):
                raise ValueError(f"{len(prompts)} responses were asked for, but {found} came")
            for element in answer:
                if keep_aborted is None or not keep_aborted():
                    self._refuse_abort(element)
            return [answers.completion(element, one) for element, one in zip(answer, asked)]

    async def generate_one(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int | None,
        vocabulary: int | None,
        routing: RoutingShape | None,
        keep_aborted: Callable[[], bool] | None,
    ) -> Completion:
        """Return the response to one prompt, by a request that is no list; see `generate`."""
        request: dict[str, object] = {
            "input_ids": list(prompt),
            "sampling_params": sampling.as_json(seed),
            "return_logprob": True,
            "stream": False,
        }
        if routing is not None:
            request["return_routed_experts"] = True
        asked = Asked(len(prompt), sampling.max_response_tokens, vocabulary, routing)
        answer = await self._call("POST", "/generate", request, self.timeout_s, asked.largest_bytes)
        with self._answer_errors("/generate"):
            if keep_aborted is None or not keep_aborted():
                self._refuse_abort(answer)
            return answers.completion(answer, asked)

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
        """Raise EngineRefused when the server was started with arguments that change what requests ask for, or has a
        fault that is known to bias what it samples (`known_faults`).

        Requests name every sampling parameter, but a watermark, for example, does not depend on them.
        """
        answer = await self._call("GET", "/server_info", None, CONTROL_TIMEOUT_S)
        with self._answer_errors("/server_info"):
            found = answers.preferences(answer)
        if faults := known_faults(answer):
            raise EngineRefused(self.url, "; ".join(faults), "A run cannot trust its tokens", self.address.log)
        if found:
            raise EngineRefused(
                self.url,
                f"it was started with {', '.join(found)}, so that its tokens or prompts may not be those asked for",
                "Start it without these arguments; [rollout] says how to sample",
            )

    async def abort_all(self) -> None:
        """End all requests: each is answered with the tokens that it has. Later ones run as usual."""
        await self._call("POST", "/abort_request", {"abort_all": True}, CONTROL_TIMEOUT_S, json=False)

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
