"""The environment "tools" offers problems that the policy may solve over several turns by calling functions.

Its calls are parsed by the engine (`rollout.tool_call_parser`) and run in the environment's worker. It imports the
standard library alone, and pyarrow where the data set is a table; it runs on Python 3.10.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fiberpo_megatron import plugins
from fiberpo_megatron.environments import Conversation, Message, Outcome, Task, Turn
from fiberpo_megatron.environments.builtin.calculator import calculator
from fiberpo_megatron.environments.builtin.chat import Chat
from fiberpo_megatron.environments.builtin.final_answers import last_number
from fiberpo_megatron.environments.builtin.math_answers import MathVerifier
from fiberpo_megatron.environments.builtin.sandbox import Bounds, Sandbox, SandboxError
from fiberpo_megatron.environments.builtin.tool_calls import ToolCaller, ToolCounts, ToolError
from fiberpo_megatron.environments.builtin.tool_schema import Tool, tool_of

CALL_MARKERS = (
    "<tool_call>",
    "<function=",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<｜tool▁calls▁begin｜>",
    "<|tool_call|>",
)
"""What tool calls begin with in common formats."""
REWARDS = ("exact", "math", "last-number")


class Tools(Chat):
    """Offers the problems of a data set as `chat` does, with tools; the last turn is scored, if it calls none."""

    not_options = ("chat_template", "retry_message")

    def __init__(
        self,
        train: str,
        held_out: str | None = None,
        tools: Sequence[str] = ("calculator",),
        reward: str = "exact",
        max_turns: int = 8,
        max_calls: int = 8,
        tool_timeout_s: float = 10.0,
        max_output_characters: int = 4000,
        sandbox: str = "auto",
        call_markers: Sequence[str] = CALL_MARKERS,
        **options: Any,
    ) -> None:
        """Find the tools and open the data sets.

        train, held_out: the problems, as `chat` reads them.
        tools: "calculator", "python" (runs a program in the sandbox of the environment "code"), or import paths of your
            own, "package.module:name": a function with type hints and a docstring, or a class with a `schema`.
        reward: what a last turn without tool calls earns. exact: 1 where its stripped text equals the answer; math: 1
            where math-verify finds it equal; last-number: 1 where its last number equals the last one of the answer; or
            the import path of a function, as for `chat`.
        max_turns: turns of the policy. Calls in the last one are not run.
        max_calls: calls in one turn; further ones are answered with an error.
        tool_timeout_s: seconds of one call. `deadline_s` bounds all calls of a trajectory.
        max_output_characters: a longer result is cut, with a note to the policy.
        sandbox: the sandbox of the tool "python": auto, bubblewrap, namespaces or rlimits, as for `code`.
        call_markers: a turn with one of these texts, but without a call that the engine could parse, is answered with
            an error instead of being taken as the final answer.
        The other options are those of `chat`.

        Raises ValueError that names the option, or the file and the line or row, with the value and the fix.
        """
        for option, value in (("max_calls", max_calls), ("max_output_characters", max_output_characters)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{option} = {value!r} must be a whole number of at least 1")
        if isinstance(tool_timeout_s, bool) or not isinstance(tool_timeout_s, (int, float)) or not tool_timeout_s > 0:
            raise ValueError(f"tool_timeout_s = {tool_timeout_s!r} must be a number of seconds above 0")
        programs = _sandbox(sandbox, float(tool_timeout_s)) if "python" in tools else None
        if programs is not None:
            self.about = f"the tool python: {programs.description}"
            print(self.about, file=sys.stderr)  # in the worker's log
        found = [_tool(one, programs) for one in tools]
        self._tools = {tool.name: tool for tool in found}
        if len(self._tools) < len(found):
            raise ValueError(f"tools = {list(tools)!r}: two of them have the same name; rename one function")
        self._schemas = [dict(tool.schema) for tool in found]
        self._caller = ToolCaller(self._tools, float(tool_timeout_s), max_output_characters, max_calls)
        self._call_markers = tuple(call_markers)
        self._mode = reward
        self._numeric_answers = reward == "last-number"
        self._verifier = MathVerifier() if reward == "math" else None
        super().__init__(
            train,
            held_out,
            reward="exact" if reward in REWARDS else reward,
            max_turns=max_turns,
            **options,
        )
        self.single_turn = False
        self.deterministic = set(tools) <= {"calculator"}

    def score(self, task: Task, turn: Turn) -> Any:
        """Return what the final answer earns."""
        if self._mode == "last-number":
            correct = last_number(turn.text) == last_number(task.answer)
        elif self._verifier is not None:
            correct = self._verifier(task.answer, turn.text)
        else:
            return super().score(task, turn)
        return Outcome(float(correct), correct=correct)

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        """Run the policy's tool calls and give it their results, until it answers or has had `max_turns` turns."""
        counts = ToolCounts()
        turn = await policy.say(task.prompt, tools=self._schemas or None)
        for _ in range(self._max_turns - 1):
            messages = [] if turn.truncated else await self._messages(turn, task, counts)
            if not messages:
                break
            try:
                turn = await policy.say(messages)
            except ValueError:  # nothing can follow: the conversation is as long as the model can read, for example
                break
        answered = not self._calls_a_tool(turn)
        outcome = await self._outcome(task, turn) if answered else Outcome(0.0, correct=False)
        metrics = {**outcome.metrics, **counts.metrics(), "answered": float(answered)}
        return Outcome(outcome.reward, outcome.rewards, outcome.correct, metrics)

    async def _messages(self, turn: Turn, task: Task, counts: ToolCounts) -> list[Message]:
        """Return what is said after a turn: the results of its calls; nothing after a final answer."""
        if turn.tool_calls:
            return await self._caller.answers(turn.tool_calls, task, counts)
        if not self._calls_a_tool(turn):
            return []
        counts.calls += 1
        counts.errors += 1
        error = (
            "Error: the tool call could not be read. Its JSON must be valid and name one of these tools: "
            f"{', '.join(self._tools)}."
        )
        return [{"role": "tool", "content": error, "name": "error", "tool_call_id": "call_0"}]

    def _calls_a_tool(self, turn: Turn) -> bool:
        """Return whether a turn calls a tool, or tries to."""
        return bool(turn.tool_calls) or (bool(self._tools) and any(text in turn.text for text in self._call_markers))


def _tool(name: str, sandbox: Sandbox | None) -> Tool:
    """Return the tool that an option names; `sandbox` is the one for programs. Raises ValueError with the fix."""
    if name == "calculator":
        return tool_of(calculator)
    if name == "python":
        assert sandbox is not None
        return _python(sandbox)
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(
            f'tools holds {name!r}; write "calculator", "python", or the import path of a function or class of yours, '
            '"package.module:name"'
        )
    target = plugins.find("tools", name, "tools").target
    try:
        return tool_of(target)
    except Exception as error:  # a constructor of somebody else's raises what it likes
        raise ValueError(f"tools: {name} cannot be offered: {error}") from error


def _sandbox(kind: str, timeout_s: float) -> Sandbox:
    try:
        return Sandbox(kind, Bounds(wall_s=timeout_s))
    except SandboxError as error:
        raise ValueError(f"the tool python: {error}") from None


def _python(sandbox: Sandbox) -> Tool:
    """Return the tool that runs a Python program in a sandbox."""

    async def python(code: str) -> str:
        """Run a Python program and return what it prints.

        code: the program; it must print its result.
        """
        run = await sandbox.run(code)
        if run.status == "timeout":
            raise TimeoutError
        if run.status != "ok":
            what = "failed" if run.status == "error" else f"was stopped (bound: {run.status})"
            raise ToolError(f"the program {what}: {(run.stderr or run.stdout)[-1000:]}")
        return run.stdout

    return replace(tool_of(python), bounds_itself=True)
