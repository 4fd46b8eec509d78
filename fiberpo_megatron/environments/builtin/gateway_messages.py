"""This module compares the messages of requests with those of earlier ones, however an agent writes them.

Agents echo what was said in their own form: contents as parts, empty contents as null, arguments of tool calls with
other spaces, answers without their thought. `plain` gives a message the form that chat templates read, and
`fingerprint` leaves out of it what may differ although the message is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
END_OF_THOUGHT = "</think>"
"""What ends a thought in the text of a model that thinks before it answers."""


class BadRequest(ValueError):
    """A request asks for what the gateway does not have; `param` and `code` are those of OpenAI's errors."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def without_thought(text: str) -> tuple[str | None, str]:
    """Return the thought at the beginning of a text, or None, and what follows it."""
    thought, end, answer = text.rpartition(END_OF_THOUGHT)
    if not end:
        return None, text
    return thought.strip().removeprefix("<think>").strip(), answer.lstrip("\n")


def plain(message: Any, position: int) -> dict[str, Any]:
    """Return a message as chat templates read it. Raises BadRequest that names its field.

    Parts of texts are joined by a line break, `developer` is `system`, and the arguments of tool calls are objects
    where they are JSON objects, because templates write them as JSON again.
    """
    where = f"messages[{position}]"
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} must be an object with `role` and `content`", where)
    role = message.get("role")
    if role not in ROLES:
        raise BadRequest(f"{where}.role = {role!r:.80}; use one of {', '.join(ROLES)}", f"{where}.role")
    found: dict[str, Any] = {"role": "system" if role == "developer" else role}
    found["content"] = _content(message.get("content"), f"{where}.content")
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise BadRequest(f"{where}.{name} must be a text", f"{where}.{name}")
            found[name] = value
    calls = message.get("tool_calls")
    if role == "assistant" and calls:
        found["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(_list(calls, where))]
    return found


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise BadRequest(f"{where}.tool_calls must be a list", f"{where}.tool_calls")
    return value


def _content(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRequest(f"{where} must be a text, a list of parts or null", where)
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise BadRequest(f"{where}[{i}] must be a part of the type text; the policy reads text alone", where)
        texts.append(part[kind])
    return "\n".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise BadRequest(f"{where} must be an object with `function.name` and `function.arguments`", where)
    assert isinstance(function, Mapping)
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": name, "arguments": _arguments(function.get("arguments"))},
    }


def _arguments(value: Any) -> Any:
    """Return the arguments of a tool call as an object where they are one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return found if isinstance(found, dict) else value


def fingerprint(message: Mapping[str, Any]) -> str:
    """Return what two forms of the same message have in common.

    Of an assistant's message the thought, the spaces around the text, the ids of tool calls and the text beside tool
    calls are left out: the tokens of an answer that the policy gave are kept as they were sampled, whatever an agent
    echoes.
    """
    content = message["content"]
    if message["role"] != "assistant":
        return json.dumps([message["role"], content, message.get("name")])
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())]
    return json.dumps(["assistant", calls or without_thought(content)[1].strip()], sort_keys=True)
