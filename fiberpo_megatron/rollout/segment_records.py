"""This module turns the segments of a response, each of which one request has sampled, into bytes and back.

A segment is known by its response, and by the tokens that the response had before it. The response is known by the seed
of its draws and its prompt, which no two responses of a step share.
"""

import json
import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from fiberpo_megatron.types import Completion, WeightSpan

KEY_BYTES = 16
_HEAD = struct.Struct(f"<{KEY_BYTES}sQI")
"""Key of the response, tokens that it had before the segment, bytes of the description that follows."""
_ARRAYS = ("log_probs", "engines", "routed_experts")


class Place(NamedTuple):
    """It says which segment a record holds."""

    key: bytes
    begin: int


def response_key(prompt: Sequence[int], seed: int) -> bytes:
    """Return 16 bytes that name a response."""
    digest = blake2b(struct.pack("<Q", seed & (2**64 - 1)), digest_size=KEY_BYTES)
    digest.update(np.asarray(prompt, np.int64).tobytes())
    return digest.digest()


def encode(place: Place, segment: Completion) -> bytes:
    """Return the bytes of a segment. It has no loss mask and no scores of other models: those come later."""
    arrays = [np.asarray(segment.token_ids, np.int64)]
    described: dict[str, Any] = {
        "tokens": len(segment.token_ids),
        "finish_reason": segment.finish_reason,
        "weight_spans": [[span.version, span.start, span.end] for span in segment.weight_spans],
    }
    for name in _ARRAYS:
        if (array := getattr(segment, name)) is not None:
            arrays.append(np.ascontiguousarray(array))
            described[name] = [array.dtype.str, array.shape]
    text = json.dumps(described).encode()
    return b"".join([_HEAD.pack(*place, len(text)), text, *(array.tobytes() for array in arrays)])


def place_of(payload: bytes) -> Place:
    """Return which segment bytes hold, of which the first `HEAD_BYTES` are enough."""
    key, begin, _ = _HEAD.unpack(payload[: _HEAD.size])
    return Place(key, begin)


HEAD_BYTES = _HEAD.size


def decode(payload: bytes) -> Completion:
    """Return the segment that bytes hold. Raises ValueError, KeyError or TypeError for bytes that hold none."""
    size = _HEAD.unpack(payload[: _HEAD.size])[2]
    at = _HEAD.size + size
    described = json.loads(payload[_HEAD.size : at])
    shapes = {"token_ids": ["<i8", [described["tokens"]]], **{n: described[n] for n in _ARRAYS if n in described}}
    found: dict[str, Any] = {}
    for name, (dtype, shape) in shapes.items():
        kind = np.dtype(dtype)
        end = at + kind.itemsize * int(np.prod(shape))
        found[name] = np.frombuffer(payload[at:end], kind).reshape(shape).copy()
        at = end
    if at != len(payload):
        raise ValueError(f"{len(payload)} bytes, but its description is of {at}")
    return Completion(
        tuple(found["token_ids"].tolist()),
        found["log_probs"],
        described["finish_reason"],
        tuple(WeightSpan(*span) for span in described["weight_spans"]),
        found.get("routed_experts"),
        engines=found.get("engines"),
    )
