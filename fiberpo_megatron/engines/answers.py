"""This module checks SGLang's JSON answers and gives them types.

A bad answer raises ValueError; the client adds the server's address.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.types import Completion, WeightSpan


def field(answer: object, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return `answer[name]`, which must be of type `kind`."""
    if not isinstance(answer, Mapping) or name not in answer:
        have = sorted(answer) if isinstance(answer, Mapping) else type(answer).__name__
        raise ValueError(f"the answer lacks the field {name!r} (it has: {have})")
    value = answer[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"the field {name!r} of the answer is {value!r:.200}")
    return value


def completion(answer: object, routed_experts: tuple[int, int] | None = None) -> Completion:
    """Return one element of a /generate answer. `routed_experts`: (MoE layers, top_k) if they were asked for."""
    token_ids = tuple(field(answer, "output_ids", list))
    info = field(answer, "meta_info", dict)
    reason = field(field(info, "finish_reason", dict), "type", str)
    log_probs = _log_probs(field(info, "output_token_logprobs", list), token_ids)
    experts = None
    if routed_experts is not None:
        rows = field(info, "prompt_tokens", int) + len(token_ids) - 1
        experts = experts_array(field(info, "routed_experts", str), rows, *routed_experts)
    return Completion(token_ids, log_probs, reason, _weight_spans(info, len(token_ids)), experts)


def prompt_log_probs(answer: object, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the [len - 1] log-probs of token_ids[1:], from a /generate answer with `logprob_start_len` 0.

    SGLang 0.5 scores token 0 in place of the vocabulary's last one in a prompt (its guard against image hashes is off
    by one) and names it 0; the log-probs of such positions are nan.
    """
    entries = field(field(answer, "meta_info", dict), "input_token_logprobs", list)
    if len(entries) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens were to be scored, but the answer has log-probs for {len(entries)}")
    last = max(token_ids)
    replaced = [a == last and int(entry[1]) == 0 != a for a, entry in zip(token_ids[1:], entries[1:])]
    named = [0 if wrong else token for token, wrong in zip(token_ids[1:], replaced)]
    return np.where(replaced, np.float32(np.nan), _log_probs(entries[1:], named))


def abort_message(answer: object) -> str | None:
    """Return why the engine aborted this response; None when it did not."""
    reason = field(field(answer, "meta_info", dict), "finish_reason", dict)
    return str(reason.get("message", "no reason given")) if reason.get("type") == "abort" else None


def experts_array(encoded: str, rows: int, layers: int, top_k: int) -> NDArray[np.int32]:
    """Return [rows, layers, top_k] from base64 of little-endian int32."""
    raw = base64.b64decode(encoded, validate=True)
    if len(raw) != 4 * rows * layers * top_k:
        raise ValueError(
            f"routed_experts has {len(raw)} bytes, {4 * rows * layers * top_k} were expected for {rows} "
            f"positions x {layers} layers x top-{top_k}"
        )
    return np.frombuffer(raw, dtype="<i4").astype(np.int32).reshape(rows, layers, top_k)


def _log_probs(entries: Sequence[Any], token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the log-probs of SGLang's [log_prob, token id, text] triples, which must name `token_ids`."""
    try:
        named = [int(entry[1]) for entry in entries]
        values = [float(entry[0]) for entry in entries]
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"log-prob entries are not [number, token id, ..]: {entries!r:.200}") from error
    if named != list(token_ids):
        raise ValueError(f"log-probs of {len(named)} tokens {named} came for {len(token_ids)}: {list(token_ids)}")
    for index, value in enumerate(values):
        if not math.isfinite(value) or value > 1e-4:  # rounding of log(softmax) may leave a hair above 0
            raise ValueError(f"the log-prob of token {token_ids[index]} at position {index} is {value}")
    return np.asarray(values, dtype=np.float32)


def _weight_spans(info: Mapping[str, Any], tokens: int) -> tuple[WeightSpan, ...]:
    """Return the weights' versions over [0, tokens), without gap or overlap."""
    spans = tuple(
        WeightSpan(str(field(s, "version", str)), field(s, "start", int), field(s, "end", int))
        for s in field(info, "weight_versions", list)
    )
    edges = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != edges[:-1] or edges[-1] != tokens:
        raise ValueError(f"weight_versions {spans} do not cover the {tokens} response tokens")
    return spans
