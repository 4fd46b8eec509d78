"""Agents for the tests of the gateway: they talk to it by OpenAI's own client, and say what they saw."""

import asyncio
import json
from pathlib import Path
from typing import Any

from openai import APIStatusError, AsyncOpenAI, OpenAI

from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Turn

TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


class Words(SingleTurn):
    """Tasks whose prompt names what the agent does; the answer "right" is right."""

    train_size = 100
    held_out_size = 10

    def train(self, index: int) -> Task:
        return Task(f"task {index}", "right")

    held_out = train

    def score(self, task: Task, turn: Turn) -> float:
        return float(turn.text == task.answer)


def client(url: str, key: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=30)


def user(text: str) -> Any:
    return {"role": "user", "content": text}


async def by_name(task: Task, url: str, key: str) -> Any:
    """Do what the task's answer names: a function of this module. Its result goes into the task's file as JSON."""
    async with client(url, key) as policy:
        found = await globals()[task.answer](policy)
    Path(task.metadata["file"]).write_text(json.dumps(found))
    return 1.0


async def says_once(policy: AsyncOpenAI) -> Any:
    found = await policy.chat.completions.create(model="policy", messages=[user("hello")], max_tokens=7)
    return found.model_dump()


async def streams(policy: AsyncOpenAI) -> Any:
    texts: list[Any] = []
    calls: list[Any] = []
    stream = await policy.chat.completions.create(
        model="policy", messages=[user("hello")], tools=TOOLS, stream=True, stream_options={"include_usage": True}
    )
    reasons, usages = [], []
    async for chunk in stream:
        usages += [chunk.usage.model_dump()] if chunk.usage else []
        for choice in chunk.choices:
            texts += [choice.delta.content] if choice.delta.content is not None else []
            calls += [call.model_dump() for call in choice.delta.tool_calls or ()]
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return {"texts": texts, "calls": calls, "reasons": reasons, "usages": usages}


async def talks(policy: AsyncOpenAI) -> Any:
    """Continue twice, echoing answers in other forms; then leave at the first answer; then rewrite everything."""
    said: list[Any] = [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, user("one")]

    async def ask(messages: list[Any]) -> Any:
        return (await policy.chat.completions.create(model="any", messages=messages, tools=TOOLS)).choices[0].message

    first = await ask(said)
    said.append({"role": "assistant", "content": [{"type": "text", "text": f" {first.content}\n"}]})
    fork = [*said]
    said.append(user("two"))
    second = await ask(said)  # which calls a tool
    (call,) = second.tool_calls
    arguments = json.dumps(json.loads(call.function.arguments), indent=2)
    echo = {"id": call.id, "type": "function", "function": {"name": "add", "arguments": arguments}}
    said += [{"role": "assistant", "content": "", "tool_calls": [echo]}]
    said += [{"role": "tool", "tool_call_id": call.id, "content": "3"}]
    third = await ask(said)
    await ask([*fork, user("another two")])
    await ask([user("a summary"), {"role": "assistant", "content": "of my own"}, user("so?")])
    return third.content


async def at_once(policy: AsyncOpenAI) -> Any:
    """Ask the same three times at once, then go on in two of the answers."""

    async def ask(messages: list[Any]) -> str:
        found = await policy.chat.completions.create(model="policy", messages=messages)
        return str(found.choices[0].message.content)

    first = await asyncio.gather(*(ask([user("hello")]) for _ in range(3)))
    pasts = [[user("hello"), {"role": "assistant", "content": text}, user("and?")] for text in first[:2]]
    return [*first, *await asyncio.gather(*map(ask, pasts))]


async def thinks(policy: AsyncOpenAI) -> Any:
    """Echo an answer without its thought."""
    found = (await policy.chat.completions.create(model="policy", messages=[user("hello")])).choices[0].message
    past = [user("hello"), {"role": "assistant", "content": found.content}, user("and?")]
    await policy.chat.completions.create(model="policy", messages=past)
    return found.model_dump()


WRONG: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"top_p": 0.5}, {"n": 2}, {"stop": ["Observation:"]}, {"logprobs": True}, {"seed": 1},
    {"response_format": {"type": "json_object"}}, {"tool_choice": "required", "tools": TOOLS}, {"max_tokens": 0},
    {"presence_penalty": 0.5}, {"messages": []}, {"messages": [{"role": "critic", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"tools": [{"type": "web_search"}]}, {"extra_body": {"top_k": 3}}, {"messages": [user("refuse")]},
]  # fmt: skip


async def asks_wrongly(policy: AsyncOpenAI) -> Any:
    """Return the status, the parameter and the message of every refusal; the last request is answered."""
    seen = []
    for fields in WRONG:
        request: Any = {"model": "policy", "messages": [user("hello")], **fields}
        try:
            await policy.chat.completions.create(**request)
            seen.append([200, None, str(fields)])
        except APIStatusError as error:
            body: Any = error.body
            seen.append([error.status_code, body["param"], body["message"]])
    await policy.chat.completions.create(
        model="policy", messages=[user("hello")], temperature=1.0, top_p=1.0, stop=["\n"], n=1, tool_choice="auto"
    )
    return seen


async def asks_elsewhere(policy: AsyncOpenAI) -> Any:
    """Ask with other keys, other paths, and a body that is too large."""
    await policy.chat.completions.create(model="policy", messages=[user("hello")])
    models = [model.id async for model in policy.models.list()]
    statuses = {}
    base, own = str(policy.base_url), {"Authorization": f"Bearer {policy.api_key}"}
    large = json.dumps({"messages": [user("x" * 5000)]})
    for name, method, path, headers, body in [
        ("no key", "POST", "chat/completions", {}, "{}"),
        ("another key", "GET", "models", {"Authorization": "Bearer sk-another"}, None),
        ("another scheme", "GET", "models", {"Authorization": f"Basic {policy.api_key}"}, None),
        ("another path", "GET", "../metrics", own, None),
        ("another model", "GET", "models/gpt", own, None),
        ("another method", "GET", "chat/completions", own, None),
        ("large", "POST", "chat/completions", own, large),
        ("many messages", "POST", "chat/completions", own, json.dumps({"messages": [user("x")] * 20})),
        ("no JSON", "POST", "chat/completions", own, "{"),
        ("deep JSON", "POST", "chat/completions", own, "[" * 1500),
    ]:
        answer = await policy._client.request(method, base + path, headers=headers, content=body)
        found = answer.json()["error"]
        assert set(found) == {"message", "type", "param", "code"}, found
        statuses[name] = [answer.status_code, found["code"]]
    return {"models": models, "statuses": statuses}


async def floods(policy: AsyncOpenAI) -> Any:
    for _ in range(100):
        await policy.chat.completions.create(model="policy", messages=[user("hello")])


async def does_nothing(policy: AsyncOpenAI) -> Any:
    return None


def blocking(task: Task, url: str, key: str) -> Outcome:
    """Talk by the synchronous client."""
    with OpenAI(base_url=url, api_key=key, max_retries=0) as policy:
        found = policy.chat.completions.create(model="policy", messages=[user("hello")])
    return Outcome(0.5, {"style": 0.25}, metrics={"length": len(found.choices[0].message.content or "")})


async def returns_nothing(task: Task, url: str, key: str) -> None:
    async with client(url, key) as policy:
        await says_once(policy)


async def several(task: Task, url: str, key: str) -> float:
    """Begin twice at once, go on in one of both, rewrite the past, and stream with tools."""

    async def ask(messages: list[Any], **fields: Any) -> str:
        found = await policy.chat.completions.create(model="policy", messages=messages, **fields)
        return found.choices[0].message.content or ""

    async with client(url, key) as policy:
        begin: list[Any] = list(task.prompt)
        first, _ = await asyncio.gather(ask(begin), ask(begin))
        await ask([*begin, {"role": "assistant", "content": first}, user("and?")])
        await ask([user("in short"), {"role": "assistant", "content": "yes"}, user("so?")], max_tokens=5)
        stream = await policy.chat.completions.create(model="policy", messages=begin, tools=TOOLS, stream=True)
        async for _ in stream:
            pass
    return float(len(first) % 2)
