"""The environment "verifiers" trains on environments of the verifiers package, in an interpreter that has the package.

The package holds the conversation and scores it; its model client is the policy's conversation here, so that what the
engine sampled is never tokenised again. Messages that continue what was said continue its tokens, and messages that
rewrite it begin a branch of the trajectory, as for the environment "gateway". This module itself needs the standard
library alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

from fiberpo_megatron.environments import Conversation, Environment, Message, Outcome, Split, Task
from fiberpo_megatron.environments.builtin.gateway_answers import finish_reason, usage_of
from fiberpo_megatron.environments.builtin.gateway_branches import AgentConversation
from fiberpo_megatron.environments.builtin.gateway_messages import plain
from fiberpo_megatron.environments.builtin.gateway_requests import parse_request
from fiberpo_megatron.plugins import make_current_folder_importable

VERSION = "0.3.1"
"""The newest release with the classes SingleTurnEnv, ToolEnv, MultiTurnEnv and Rubric."""
MODEL = "policy"
MOST_MESSAGES = 4096


class Verifiers(Environment):
    """Offers the tasks of an environment of the verifiers package, which also holds and scores the conversations.

    environment: the name under which the package loads it: that of an installed package such as "gsm8k", or of a module
        in the current folder, with a function `load_environment`.
    arguments: arguments of its `load_environment`.
    train_size: number of training tasks, from the beginning of its data set. Unset: all that are not held out.
    held_out_size: number of tasks for evaluation. They come from the environment's own evaluation set; where it has
        none, they are the last ones of its data set, and are not trained on.
    chat_template_kwargs: variables of the chat template, as its makers document them (enable_thinking, ...).

    Raises ValueError that names the option, its value and the fix.
    """

    def __init__(
        self,
        environment: str,
        arguments: Mapping[str, Any] | None = None,
        train_size: int | None = None,
        held_out_size: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for option, value, least in (("train_size", train_size, 1), ("held_out_size", held_out_size, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{option} = {value!r} must be a whole number of at least {least}")
        package = _import_package()
        make_current_folder_importable()
        try:
            self._environment = package.load_environment(environment, **(arguments or {}))
        except Exception as error:  # a package of somebody else's raises what it likes
            cause = "" if str(error.__cause__ or "") in str(error) else f" ({error.__cause__})"
            raise ValueError(
                f"environment = {environment!r} could not be loaded by verifiers with arguments = "
                f"{dict(arguments or {})!r}: {error}{cause}"
            ) from error
        if self._environment.rubric.has_group_rewards:
            raise ValueError(
                f"environment = {environment!r} has rewards that compare the samples of one task, which this adapter "
                "cannot give it together; take a rubric whose rewards look at one sample"
            )
        self._name = environment
        self._client_class = _client_class()
        own = getattr(self._environment, "eval_dataset_source", None) is not None
        self._rows: dict[Split, Any] = {"train": self._environment.get_dataset()}
        found = len(self._rows["train"])
        self._rows["held_out"] = self._environment.get_eval_dataset() if own else self._rows["train"]
        self._held_out_from = 0 if own else found - held_out_size
        left = found if own else self._held_out_from
        if left < (train_size or 1) or held_out_size > len(self._rows["held_out"]):
            raise ValueError(
                f"train_size = {train_size} and held_out_size = {held_out_size}: {environment!r} has {found} training "
                f"tasks, and {len(self._rows['held_out']) if own else 'no'} evaluation tasks of its own; lower them"
            )
        self.train_size = left if train_size is None else train_size
        self.held_out_size = held_out_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def train(self, index: int) -> Task:
        """Return the task of the row at `index` of the environment's data set."""
        return self._task("train", index)

    def held_out(self, index: int) -> Task:
        """Return a task of the environment's evaluation set, or of the end of its data set where it has none."""
        return self._task("held_out", index)

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        """Let the environment hold the conversation, and return its reward; each reward function is a component.

        Raises RuntimeError when the environment ended the conversation with an error.
        """
        row = self._row(task.metadata["split"], task.metadata["index"])
        client = self._client_class(AgentConversation(policy), policy.sampling)
        arguments = dict(self._environment.sampling_args)
        found = await self._environment.run_rollout(row, client, MODEL, arguments)
        if found.get("error"):
            raise RuntimeError(f"the environment {self._name!r} ended with an error: {found['error']}")
        components = {name: float(value) for name, value in (found.get("metrics") or {}).items() if _is_number(value)}
        reward = float(found["reward"] or 0.0)
        counts = client.native.counts
        return Outcome(
            reward,
            components,
            correct=reward >= getattr(self._environment, "pass_threshold", 0.5),
            metrics={"branches": float(counts["forked"] + counts["rewritten"])},
        )

    def _task(self, split: Split, index: int) -> Task:
        row = self._row(split, index)
        answer = row.get("answer")
        metadata = {"split": split, "index": index, "environment": self._name}
        return Task(_messages(row["prompt"]), answer if isinstance(answer, str) and answer else None, metadata)

    def _row(self, split: Split, index: int) -> dict[str, Any]:
        return dict(self._rows[split][index + (self._held_out_from if split == "held_out" else 0)])


def _messages(prompt: Any) -> str | list[Message]:
    """Return a prompt in the form that chat templates read; a data set gives each message all fields of any."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [plain(dict(message), number) for number, message in enumerate(prompt)]


def _client_class() -> Any:
    """Return the class of the package's model clients that speak to the policy; the package must be installed."""
    types, clients, errors = (import_module(f"verifiers.{name}") for name in ("types", "clients", "errors"))

    class PolicyClient(clients.Client):  # type: ignore[name-defined]
        """Answers the requests of one conversation by the policy. It takes (conversation, the run's sampling)."""

        def __init__(self, native: AgentConversation, sampling: Mapping[str, float]) -> None:
            super().__init__(native)
            self.native, self.sampling = native, sampling

        async def get_response(
            self,
            prompt: Sequence[Any],
            model: str,
            sampling_args: Mapping[str, Any],
            tools: Sequence[Any] | None = None,
            **_: Any,
        ) -> Any:
            """Return the policy's turn. Other ways of sampling than the run's (temperature, ...) have no effect."""
            body: dict[str, Any] = {"messages": [_wire_message(message) for message in prompt]}
            if tools:
                body["tools"] = [_wire_tool(tool) for tool in tools]
            for name in ("max_tokens", "max_completion_tokens", "stop"):
                if sampling_args.get(name) is not None:
                    body[name] = sampling_args[name]
            request = parse_request(body, self.sampling, ignore_sampling=True, max_messages=MOST_MESSAGES)
            try:
                turn, message = await self.native.answer(request)
            except ValueError as error:
                if self.native.last is None:
                    raise  # not even the task can be said: that is no fault of the policy
                raise errors.OverlongPromptError from error  # nothing can follow: the package ends the conversation
            usage = {"reasoning_tokens": 0, **usage_of(turn)}
            said = {
                "content": message["content"],
                "reasoning_content": message.get("reasoning_content"),
                "tool_calls": [{"id": c["id"], **c["function"]} for c in message.get("tool_calls", ())] or None,
                "finish_reason": finish_reason(turn),
                "is_truncated": turn.truncated,
            }
            return types.Response(id="", created=int(time.time()), model=model, usage=usage, message=said)

        def setup_client(self, config: Any) -> Any:
            raise NotImplementedError("the policy's client is made with a conversation")

        async def close(self) -> None:
            pass

        to_native_tool = to_native_prompt = get_native_response = setup_client
        raise_from_native_response = from_native_response = setup_client

    return PolicyClient


def _wire_message(message: Any) -> dict[str, Any]:
    """Return a message of the package in OpenAI's form."""
    fields = dict(message) if isinstance(message, Mapping) else message.model_dump()
    calls = fields.pop("tool_calls", None)
    if calls:
        fields["tool_calls"] = [
            {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
            for c in calls
        ]
    return fields


def _wire_tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _import_package() -> Any:
    """Return the package verifiers. Raises ValueError when it is missing or is another one than needed."""
    try:
        package = import_module("verifiers")
    except ImportError as error:
        raise ValueError(
            f"the environment needs the package verifiers ({error}), which {sys.executable} does not have; make an "
            f"interpreter for it (`python -m venv FOLDER; FOLDER/bin/pip install verifiers=={VERSION}`) and name it in "
            '`python = "FOLDER/bin/python"`'
        ) from error
    if not hasattr(package, "load_environment"):
        raise ValueError(
            f"verifiers {metadata.version('verifiers')} has no environments that this adapter can run: since 0.4.0 "
            f"they are programs that talk to OpenAI's API. Install verifiers=={VERSION}, or run such a program with "
            'use = "gateway"'
        )
    return package
