"""This module writes the policy's turns as OpenAI's answers: one object, or the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from fiberpo_megatron.environments import Turn
from fiberpo_megatron.environments.builtin.gateway_messages import without_thought


def message_of(turn: Turn) -> dict[str, Any]:
    """Return a turn as an assistant's message. Tool calls get ids; a thought becomes `reasoning_content`."""
    thought, text = without_thought(turn.text)
    calls = [
        {
            "id": call.id or f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in turn.tool_calls
    ]
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
    if thought is not None:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def usage_of(turn: Turn) -> dict[str, int]:
    """Return the numbers of tokens that a turn read and wrote; the token that ended the turn is among them."""
    written = len(turn.token_ids)
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": turn.prompt_tokens + written,
    }


def finish_reason(turn: Turn) -> str:
    """Return why a turn ended, in OpenAI's words: tool_calls, length or stop."""
    return "length" if turn.truncated else "tool_calls" if turn.tool_calls else "stop"


def completion_of(turn: Turn, message: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the whole answer of a turn that has this message."""
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(turn)}
    return {**_head("chat.completion", model), "choices": [choice], "usage": usage_of(turn)}


def stream_of(turn: Turn, message: dict[str, Any], model: str, *, include_usage: bool) -> Iterator[bytes]:
    """Yield the events of a stream: the role, the text, each tool call, why it ended, and the usage if asked for."""
    head = _head("chat.completion.chunk", model)
    usage: dict[str, Any] = {"usage": None} if include_usage else {}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **usage})

    yield chunk({"role": "assistant", "content": None if message["content"] is None else ""})
    if message.get("reasoning_content"):
        yield chunk({"reasoning_content": message["reasoning_content"]})
    if message["content"]:
        yield chunk({"content": message["content"]})
    for index, call in enumerate(message.get("tool_calls", ())):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, finish_reason(turn))
    if include_usage:
        yield event({**head, "choices": [], "usage": usage_of(turn)})
    yield b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def error_of(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models_of(model: str) -> dict[str, Any]:
    """Return the list of the one model."""
    return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "fiberpo"}]}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(16)}", "object": kind, "created": int(time.time()), "model": model}
