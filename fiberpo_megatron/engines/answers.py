"""This module checks SGLang's JSON answers and gives them types. It trusts nothing about them.

A bad answer raises ValueError, and no other exception; the client adds the server's address.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.environments import ToolCall
from fiberpo_megatron.printable import printable
from fiberpo_megatron.types import Completion, WeightSpan, expert_dtype

CONTROL_BYTES = 32 << 20
"""Largest answer to a call that generates nothing; the longest known one names a checksum for every tensor."""
RESPONSE_BYTES = 64 << 10
"""Largest part of a response that does not grow with its tokens."""
OUTPUT_TOKEN_BYTES = 256
"""Largest share of one response token: id and log-prob take about 41 bytes, with other weights for every token 85; the
rest is for its text, which servers with a tokenizer send as well."""
INPUT_TOKEN_BYTES = 128
"""Largest share of one prompt token: its log-prob, where it is scored, or its id."""
LOWEST, HIGHEST = float(np.finfo(np.float32).min), 1e-4
"""Range of log-probs: float32, and rounding of log(softmax) may leave a hair above 0."""
LARGEST_TOKEN = 2**31 - 1
REASONS = ("stop", "length", "abort")
PREFERENCES: dict[str, object] = {
    "preferred_sampling_params": None,
    "watermark_default_enabled": False,
    "watermark_enforce_all": False,
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
    "enable_strict_thinking": False,
    "allow_auto_truncate": False,
}
"""Arguments of a server by which it departs from what a request asks for, with the values that change nothing."""


@dataclass(frozen=True)
class RoutingShape:
    """Says what the experts of one token look like in an answer."""

    layers: int
    """MoE layers."""
    top_k: int
    """Experts that a token goes to in a layer."""
    experts: int
    """Experts of a layer; their ids are below it."""


@dataclass(frozen=True)
class Asked:
    """Says what a request has asked for, so that its answer can be held against it."""

    prompt_tokens: int
    max_response_tokens: int
    vocabulary: int | None = None
    """Ids of response tokens are below it; None: they are not checked."""
    routing: RoutingShape | None = None
    """Shape of the experts where they were asked for."""
    known_routes: int = 0
    """First position of the prompt whose experts were asked for; earlier answers have those before it."""

    @property
    def largest_bytes(self) -> int:
        """Return the size above which an answer is refused unread."""
        rows = self.prompt_tokens + self.max_response_tokens - self.known_routes
        experts = 0 if self.routing is None else 6 * rows * self.routing.layers * self.routing.top_k  # base64 of int32
        tokens = OUTPUT_TOKEN_BYTES * self.max_response_tokens + INPUT_TOKEN_BYTES * self.prompt_tokens
        return RESPONSE_BYTES + tokens + experts


def parsed(body: bytes | bytearray) -> Any:
    """Return the value of a JSON text."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError(f"its {len(body)} bytes of JSON are nested too deeply") from None


def short(value: object, characters: int = 200) -> str:
    """Return the begin of a text, or of the text for a value, without control characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # too many digits, or nested too deeply
        text = f"a {type(value).__name__} that cannot be shown"
    return printable(text[:characters])


def field(answer: object, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return `answer[name]`, which must be of type `kind`."""
    if not isinstance(answer, Mapping) or name not in answer:
        have = short(sorted(answer)) if isinstance(answer, Mapping) else type(answer).__name__
        raise ValueError(f"the answer lacks the field {name!r} (it has: {have})")
    value = answer[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"the field {name!r} of the answer is {short(value)} ({type(value).__name__})")
    return value


def completion(answer: object, asked: Asked) -> Completion:
    """Return one element of a /generate answer."""
    token_ids = tuple(_token_ids(field(answer, "output_ids", list), asked))
    info = field(answer, "meta_info", dict)
    reason = field(field(info, "finish_reason", dict), "type", str)
    if reason not in REASONS:
        raise ValueError(f"the finish reason is {short(reason)}; known are {', '.join(REASONS)}")
    if reason == "abort" and not token_ids:  # it was aborted in the queue, and says little more
        return Completion((), np.zeros(0, np.float32), reason, ())
    prompt_tokens = field(info, "prompt_tokens", int)
    if prompt_tokens != asked.prompt_tokens:
        raise ValueError(f"it answers a prompt of {short(prompt_tokens)} tokens, but {asked.prompt_tokens} were sent")
    log_probs = _log_probs(field(info, "output_token_logprobs", list), token_ids)
    experts = None
    if asked.routing is not None:
        rows = prompt_tokens + len(token_ids) - 1 - asked.known_routes
        experts = experts_array(field(info, "routed_experts", str), rows, asked.routing)
    return Completion(token_ids, log_probs, reason, _weight_spans(info, len(token_ids)), experts)


def prompt_log_probs(answer: object, token_ids: Sequence[int], first: int = 1) -> NDArray[np.float32]:
    """Return the [len - first] log-probs of token_ids[first:], from a /generate answer with `logprob_start_len`
    first - 1.

    SGLang 0.5 scores token 0 in place of the vocabulary's last one in a prompt (its guard against image hashes is off
    by one) and names it 0; the log-probs of such positions are nan.
    """
    entries = field(field(answer, "meta_info", dict), "input_token_logprobs", list)
    asked = len(token_ids) - first + 1
    if len(entries) != asked:
        raise ValueError(f"{asked} tokens were to be scored, but the answer has log-probs for {len(entries)}")
    last = max(token_ids)
    replaced = [a == last and _named(entry) == 0 != a for a, entry in zip(token_ids[first:], entries[1:])]
    named = [0 if wrong else token for token, wrong in zip(token_ids[first:], replaced)]
    return np.where(replaced, np.float32(np.nan), _log_probs(entries[1:], named))


def texts(answer: object, count: int) -> list[str]:
    """Return the `count` texts of an answer to /v1/detokenize."""
    found = field(answer, "text", list)
    if len(found) != count or not all(isinstance(text, str) for text in found):
        raise ValueError(f"the texts of {count} tokens were asked for, but the answer is {short(found)}")
    return found


def abort_message(answer: object) -> str | None:
    """Return why the engine aborted this response; None when it did not."""
    reason = field(field(answer, "meta_info", dict), "finish_reason", dict)
    if reason.get("type") != "abort":
        return None
    return short(reason.get("message", "no reason given"))


def tool_calls(answer: object) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the text around the tool calls in an answer to /parse_function_call, and the calls."""
    calls = tuple(
        ToolCall(field(call, "name", str), field(call, "parameters", str), f"call_{number}")
        for number, call in enumerate(field(answer, "calls", list))
    )
    return field(answer, "normal_text", str), calls


def parallel_size(answer: object) -> int:
    """Return the tensor-parallel ranks of a server, from /server_info."""
    if field(answer, "dp_size", int) != 1:
        raise ValueError("it runs data-parallel replicas (dp_size > 1); start one server per replica")
    size = int(field(answer, "tp_size", int))
    if size < 1:
        raise ValueError(f"it says that it has {short(size)} tensor-parallel ranks")
    return size


def checksum(answer: object) -> str:
    """Return the checksums of all ranks joined, from /weights_checker."""
    ranks = field(answer, "ranks", list)
    if not ranks:
        raise ValueError("it names no rank")
    return "-".join(field(rank, "per_gpu_checksum", str) for rank in ranks)


@dataclass(frozen=True)
class EngineLoad:
    """Holds what a server says about its work right now."""

    running: int
    """Requests that it decodes."""
    queued: int
    """Requests that wait in its queue."""
    token_usage: float
    """Share of the KV cache that is in use."""
    cache_hit_rate: float
    """Share of the prompt tokens that the prefix cache had, over the server's last interval of statistics."""
    generation_tokens_per_second: float
    """Rate of its last decoding batches."""


def load(answer: object) -> EngineLoad:
    """Return the load of a server, from /v1/loads. Several data-parallel replicas are added up."""
    rows = field(answer, "loads", list)
    if not rows:
        raise ValueError("it names no replica")
    number = (int, float)

    def values(name: str, kind: type | tuple[type, ...]) -> list[Any]:
        return [field(row, name, kind) for row in rows]

    return EngineLoad(
        running=sum(values("num_running_reqs", int)),
        queued=sum(values("num_waiting_reqs", int)),
        token_usage=float(max(values("token_usage", number))),
        cache_hit_rate=float(sum(values("cache_hit_rate", number)) / len(rows)),
        generation_tokens_per_second=float(sum(values("gen_throughput", number))),
    )


def preferences(answer: object) -> list[str]:
    """Return, from /server_info, the arguments by which a server departs from what requests ask for, in words."""
    if not isinstance(answer, Mapping):
        raise ValueError(f"the answer is a {type(answer).__name__}, not an object")
    return [
        f"{name} = {short(answer[name])}"
        for name, neutral in PREFERENCES.items()
        if answer.get(name, neutral) != neutral and answer[name] not in (None, {}, "")
    ]


def experts_array(encoded: str, rows: int, shape: RoutingShape) -> NDArray[Any]:
    """Return [rows, layers, top_k] uint8 or int16 from base64 of little-endian int32."""
    raw = base64.b64decode(encoded, validate=True)
    wanted = 4 * rows * shape.layers * shape.top_k
    if len(raw) != wanted:
        raise ValueError(
            f"routed_experts has {len(raw)} bytes, {wanted} were expected for {rows} "
            f"positions x {shape.layers} layers x top-{shape.top_k}"
        )
    experts = np.frombuffer(raw, dtype="<i4").reshape(rows, shape.layers, shape.top_k)
    if experts.size and not 0 <= experts.min() <= experts.max() < shape.experts:
        raise ValueError(
            f"routed_experts names experts {experts.min()} .. {experts.max()}, but a layer has {shape.experts}"
        )
    return experts.astype(expert_dtype(shape.experts))


def _token_ids(values: Sequence[Any], asked: Asked) -> Sequence[int]:
    if len(values) > asked.max_response_tokens:
        raise ValueError(
            f"it has {len(values)} response tokens, but at most {asked.max_response_tokens} were asked for"
        )
    end = LARGEST_TOKEN + 1 if asked.vocabulary is None else asked.vocabulary
    for position, value in enumerate(values):
        if type(value) is not int or not 0 <= value < end:
            raise ValueError(f"response token {position} is {short(value)}; the vocabulary is 0 .. {end - 1}")
    return values


def _named(entry: object) -> int:
    """Return the token id of SGLang's [log_prob, token id, text] triple."""
    if not isinstance(entry, list) or len(entry) < 2 or type(entry[1]) is not int:
        raise ValueError(f"log-prob entries are not [number, token id, ..]: {short(entry)}")
    return entry[1]


def _log_probs(entries: Sequence[Any], token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the log-probs of SGLang's triples, which must name `token_ids`."""
    named = list(map(_named, entries))
    if named != list(token_ids):
        raise ValueError(
            f"log-probs of {len(named)} tokens {short(named)} came for {len(token_ids)}: {short(list(token_ids))}"
        )
    for index, (value, *_) in enumerate(entries):
        if type(value) not in (int, float):
            raise ValueError(f"log-prob entries are not [number, token id, ..]: {short(entries[index])}")
        if not LOWEST <= value <= HIGHEST:  # nan is in no range
            raise ValueError(f"the log-prob of token {token_ids[index]} at position {index} is {short(value)}")
    return np.asarray([float(value) for value, *_ in entries], dtype=np.float32)


def _weight_spans(info: Mapping[str, Any], tokens: int) -> tuple[WeightSpan, ...]:
    """Return the weights' versions over [0, tokens), without gap or overlap."""
    spans = tuple(
        WeightSpan(str(field(s, "version", str)), field(s, "start", int), field(s, "end", int))
        for s in field(info, "weight_versions", list)
    )
    edges = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != edges[:-1] or edges != sorted(edges) or edges[-1] != tokens:
        raise ValueError(f"weight_versions {short(spans)} do not cover the {tokens} response tokens")
    return spans
