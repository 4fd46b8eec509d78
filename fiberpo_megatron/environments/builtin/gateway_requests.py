"""This module checks the body of a request to /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.environments.builtin.gateway_messages import BadRequest, plain

NO_EFFECT = frozenset(
    {
        "model", "messages", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "tools",
        "tool_choice", "response_format", "logprobs", "top_logprobs", "functions", "function_call", "modalities",
        "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias",
        # these have no effect on what is sampled
        "user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier",
    }
)  # fmt: skip
"""Parameters that are read below, or may have any value."""


@dataclass(frozen=True)
class ChatRequest:
    """Holds a request that can be answered."""

    messages: Sequence[dict[str, Any]]
    """In the form of `gateway_messages.plain`."""
    tools: Sequence[Mapping[str, Any]] | None
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Whether a stream ends with a chunk that has the usage."""
    ignored: tuple[str, ...]
    """Parameters that were left out of account (`sampling = "ignore"`)."""


def parse_request(body: Any, sampling: Mapping[str, float], *, ignore_sampling: bool, max_messages: int) -> ChatRequest:
    """Return the request of a JSON body. Raises BadRequest that names the parameter, its value and what is possible.

    sampling: the run's temperature and top_p. ignore_sampling: whether parameters that ask for another way of sampling
    are left out of account instead of being refused. max_messages: bound on the messages, and on the tools.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("`messages` must be a list of at least one message", "messages")
    tools = body.get("tools") or None
    for name, value in (("messages", messages), ("tools", tools)):
        if isinstance(value, list) and len(value) > max_messages:
            raise BadRequest(f"`{name}` has {len(value)} entries, allowed are {max_messages} (max_messages)", name)
    _refuse_other_forms(body)
    unmet = _unmet(body, sampling)
    if unmet and not ignore_sampling:
        name, why = next(iter(unmet.items()))
        raise BadRequest(
            f'{why}. Leave it out, or set the option sampling = "ignore" of the environment, which ignores it', name
        )
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    return ChatRequest(
        [plain(message, i) for i, message in enumerate(messages)],
        None if body.get("tool_choice") == "none" else _tools(tools),
        _limit(body),
        tuple(text for text in stop if len(text) == 1),
        _flag(body, "stream"),
        _flag(body.get("stream_options") or {}, "include_usage"),
        tuple(unmet),
    )


def _refuse_other_forms(body: Mapping[str, Any]) -> None:
    """Raise BadRequest for what would give an answer of another form."""
    if body.get("n") not in (None, 1):
        raise BadRequest(f"n = {body['n']!r:.80}; an answer has one choice, ask again for another", "n")
    for name in ("logprobs", "top_logprobs", "functions", "function_call"):
        if body.get(name):
            hint = "use `tools`" if name.startswith("function") else "the trainer keeps the log-probs itself"
            raise BadRequest(f"`{name}` is not available: {hint}", name)
    form = body.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise BadRequest(
            "`response_format` is not available, because it would change what is sampled", "response_format"
        )
    if body.get("modalities") not in (None, ["text"]):
        raise BadRequest("`modalities` may be text alone", "modalities")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise BadRequest(
            f"tool_choice = {body['tool_choice']!r:.80}; use auto or none: a forced call would not be sampled from the "
            "policy",
            "tool_choice",
        )
    stop = body.get("stop")
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise BadRequest("`stop` must be a text or a list of texts that are not empty", "stop")


def _unmet(body: Mapping[str, Any], sampling: Mapping[str, float]) -> dict[str, str]:
    """Return the parameters that ask for another way of sampling than the run's, with the reason."""
    found = {}
    for name, own in (("temperature", sampling["temperature"]), ("top_p", sampling["top_p"])):
        value = body.get(name)
        if value is not None and value != own:
            found[name] = f"{name} = {value!r:.80}, but the run samples with {own:g}, and trains on what was sampled so"
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if body.get(name):
            found[name] = f"{name} = {body[name]!r:.80}, but the run samples without it"
    stop = body.get("stop") or ()
    longer = [text for text in ([stop] if isinstance(stop, str) else stop) if len(text) > 1]
    if longer:
        found["stop"] = (
            f"stop = {longer[0]!r:.80}, but only single characters can end an answer: a longer text can be spread over "
            "tokens in many ways, and the engine sees tokens"
        )
    for name, value in body.items():
        if name not in NO_EFFECT and value is not None and not (name == "parallel_tool_calls" and value is True):
            found[name] = f"the parameter {name!r:.80} is not available here"
    return found


def _limit(body: Mapping[str, Any]) -> int | None:
    """Return the least of both names of the limit."""
    found = []
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadRequest(f"{name} = {value!r:.80}; it must be a whole number of at least 1", name)
            found.append(value)
    return min(found, default=None)


def _flag(body: Any, name: str) -> bool:
    value = body.get(name) if isinstance(body, dict) else "?"
    if value not in (None, True, False):
        raise BadRequest(f"`{name}` must be true or false", name)
    return bool(value)


def _tools(tools: Any) -> Sequence[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise BadRequest("`tools` must be a list", "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools[{i}] must be an object of the type function, with `function.name`", f"tools[{i}]")
    return tools
