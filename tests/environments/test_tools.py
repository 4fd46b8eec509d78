"""These tests run the environment with tools in real workers, with policies whose turns are written here."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.environments import Outcome, Task, ToolCall, Turn
from fiberpo_megatron.environments.builtin.calculator import calculator
from fiberpo_megatron.environments.builtin.tool_schema import problem_with, tool_of
from fiberpo_megatron.environments.builtin.tools import Tools
from fiberpo_megatron.environments.host import Failure
from fiberpo_megatron.environments.jobs import Say
from tests.environments.pools import pool_of

HERE = "tests.environments.test_tools"


# ---- tools of a user ----


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    a: the first number
    b: the second number,
        which may be left out
    """
    return a + b


async def nap(seconds: float) -> str:
    """Sleep, and say so."""
    await asyncio.sleep(seconds)
    return "awake"


def shout(text: str, task: Task) -> str:
    """Repeat a text with the answer of the task."""
    return text.upper() + str(task.answer)


def loop(hold: bool = False) -> str:
    """Never return; `hold` ignores every exception."""
    while True:
        try:
            time.sleep(0.001)
        except BaseException:
            if not hold:
                raise


def explode() -> None:
    """Raise an error."""
    raise RuntimeError("boom")


def long(characters: int) -> str:
    """Return a long text."""
    return "x" * characters


def many(*texts: str) -> None:
    """Take texts without names."""


class Store:
    """Remembers texts."""

    schema = {
        "name": "store",
        "description": "Store a text.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    }

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> int:
        self.texts.append(text)
        return len(self.texts)


# ---- policies ----


def call(name: str, arguments: Any = None, id: str | None = None) -> ToolCall:
    return ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments or {}), id)


class Scripted:
    """Says these turns, and remembers what it was told."""

    seed = 0

    def __init__(self, *turns: Turn | str) -> None:
        self.left = list(turns)
        self.said: list[tuple[Any, Any]] = []

    async def say(self, new: Any, tools: Any = None, max_tokens: int | None = None, stop: Any = None) -> Turn:
        self.said.append((new, tools))
        turn = self.left.pop(0)
        return Turn(turn) if isinstance(turn, str) else turn


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "What is 6 * 7?", "answer": "42"}) + "\n")
    return {"train": str(path)}


def result_of(options: dict[str, Any], *turns: Turn | str) -> tuple[Outcome, list[tuple[Any, Any]]]:
    """Return what a trajectory with these turns earned, and what the policy was told in it."""
    environment, policy = Tools(**options), Scripted(*turns)
    return asyncio.run(environment.run(environment.train(0), policy)), policy.said


def test_calls_are_answered_until_the_policy_answers(options):
    turns = [
        Turn("Let me see.", tool_calls=(call("calculator", {"expression": "6*7"}), call("add", {"a": 1}, "c7"))),
        "42",
    ]
    outcome, said = result_of(options | {"tools": ["calculator", f"{HERE}:add"]}, *turns)
    assert outcome == Outcome(
        1.0,
        correct=True,
        metrics={"tool_calls": 2, "tool_errors": 0, "tool_timeouts": 0, "used_tool": 1, "answered": 1},
    )
    (first, tools), (second, _) = said
    assert first == [{"role": "user", "content": "What is 6 * 7?"}]
    assert [tool["function"]["name"] for tool in tools] == ["calculator", "add"]
    assert second == [
        {"role": "tool", "content": "42", "name": "calculator", "tool_call_id": "call_0"},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c7"},
    ]


def test_everything_that_is_wrong_with_a_call_is_said_to_the_policy(options):
    calls = [
        call("search"),
        call("add", "{"),
        call("add", [1]),
        call("add", {"b": 2}),
        call("add", {"a": "1"}),
        call("add", {"a": 1, "c": 2}),
        call("explode"),
        call("calculator", {"expression": "1/0"}),
        call("long", {"characters": 50}),
        call("shout", {"text": "a"}),
        call("add", {"a": 1}),
    ]
    tools = ["calculator", *(f"{HERE}:{name}" for name in ("add", "explode", "long", "shout"))]
    turns = [Turn("", tool_calls=tuple(calls)), "42"]
    outcome, said = result_of(options | {"tools": tools, "max_calls": 10, "max_output_characters": 40}, *turns)
    contents = [message["content"] for message in said[1][0]]
    cut = "... ({} more characters were left out)"
    assert contents[0].startswith("Error: there is no tool 'search'; the to\n...")
    assert contents[1].startswith("Error: the arguments of add are not JSON")
    assert contents[2].startswith("Error: add: the arguments must be of the")
    assert contents[3] == "Error: add: the argument 'a' is missing"
    assert contents[4].startswith("Error: add: the argument 'a' must be of ")
    assert contents[5].startswith("Error: add: there is no argument 'c'; th")
    assert contents[6] == "Error: explode failed with RuntimeError:" + "\n" + cut.format(5)
    assert contents[7].startswith("Error: calculator failed with ZeroDivisi")
    assert contents[8] == "x" * 40 + "\n" + cut.format(10)
    assert contents[9] == "A42"
    assert contents[10].startswith("Error: only 10 tool calls are allowed in")
    assert isinstance(outcome, Outcome) and outcome.reward == 1
    assert outcome.metrics["tool_calls"] == 11 and outcome.metrics["tool_errors"] == 9
    assert outcome.metrics["used_tool"] == 1


def test_calls_of_one_turn_run_at_the_same_time(options):
    began = time.monotonic()
    naps = Turn("", tool_calls=tuple(call("nap", {"seconds": 1.0}) for _ in range(6)))
    result_of(options | {"tools": [f"{HERE}:nap"]}, naps, "42")
    assert 1.0 <= time.monotonic() - began < 5.0


def test_a_tool_that_loops_is_cut_and_the_policy_reads_it(options):
    turns = [Turn("", tool_calls=(call("loop"), call("nap", {"seconds": 60}), call("add", {"a": 1}))), "42"]
    tools = [f"{HERE}:{name}" for name in ("loop", "nap", "add")]
    outcome, said = result_of(options | {"tools": tools, "tool_timeout_s": 0.3}, *turns)
    contents = [message["content"] for message in said[1][0]]
    assert contents == [
        "Error: loop took longer than 0.3 s and was stopped",
        "Error: nap took longer than 0.3 s and was stopped",
        "2",
    ]
    assert isinstance(outcome, Outcome) and outcome.reward == 1 and outcome.metrics["tool_timeouts"] == 2


def test_a_tool_that_cannot_be_interrupted_costs_its_trajectory_and_its_worker_alone(options):
    def policy(*turns: Turn | str) -> Callable[[], Say]:
        def converse() -> Say:
            return Scripted(*turns).say

        return converse

    async def run() -> tuple[Any, Any]:
        settings = options | {"tools": [f"{HERE}:loop"], "tool_timeout_s": 0.2}
        async with pool_of("tools", options=settings, workers=1, memory_gib=4.0, deadline_s=30.0) as pool:
            (task,) = await pool.tasks("train", [0])
            holds = Turn("", tool_calls=(call("loop", {"hold": True}),))
            failed = await pool.run(task, policy(holds, "42"), seed=0)
            return failed, await pool.run(task, policy("42"), seed=0)

    failed, good = asyncio.run(run())
    assert isinstance(failed, Failure) and "loop took longer than 0.2 s (tool_timeout_s)" in failed.message
    assert isinstance(good, Outcome) and good.reward == 1


def test_a_call_that_the_engine_could_not_parse_is_no_final_answer(options):
    outcome, said = result_of(options, "<tool_call>\n{6*7}\n</tool_call>", "42")
    (message,) = said[1][0]
    assert message["content"].startswith("Error: the tool call could not be read") and message["role"] == "tool"
    assert isinstance(outcome, Outcome) and outcome.reward == 1
    assert outcome.metrics["tool_errors"] == 1 and outcome.metrics["used_tool"] == 0


def test_turns_are_bounded_and_a_last_turn_that_calls_a_tool_is_no_answer(options):
    turn = Turn("42", tool_calls=(call("calculator", {"expression": "6*7"}),))
    outcome, said = result_of(options | {"max_turns": 3}, turn, turn, turn, "42")
    assert len(said) == 3
    assert isinstance(outcome, Outcome) and outcome.reward == 0 and outcome.correct is False
    assert outcome.metrics["answered"] == 0 and outcome.metrics["tool_calls"] == 2


def test_a_turn_that_was_cut_ends_the_conversation(options):
    cut = Turn("42", "length", tool_calls=(call("calculator", {"expression": "6*7"}),))
    outcome, said = result_of(options, cut, "42")
    assert len(said) == 1 and isinstance(outcome, Outcome) and outcome.reward == 0


@pytest.mark.parametrize(("reward", "text"), [("last-number", "It is 42.0."), ("math", "$\\boxed{42}$")])
def test_other_rewards(options, reward, text):
    outcome, _ = result_of(options | {"reward": reward}, text)
    assert isinstance(outcome, Outcome) and outcome.reward == 1 and outcome.metrics["used_tool"] == 0


def test_programs_run_in_a_sandbox(options, tmp_path):
    calls = [
        call("python", {"code": "print(sum(range(10)))"}),
        call("python", {"code": "raise ValueError(7)"}),
        call("python", {"code": "while True: pass"}),
        call("python", {"code": f"open({str(tmp_path / 'x')!r}, 'w')"}),
    ]
    turns = [Turn("", tool_calls=tuple(calls)), "42"]
    outcome, said = result_of(options | {"tools": ["python"], "tool_timeout_s": 3.0}, *turns)
    contents = [message["content"] for message in said[1][0]]
    assert contents[0] == "45\n"
    assert contents[1].startswith("Error: the program failed: ") and contents[1].rstrip().endswith("ValueError: 7")
    assert contents[2] == "Error: python took longer than 3 s and was stopped"
    assert contents[3].startswith("Error: the program failed: ") and not (tmp_path / "x").exists()
    assert isinstance(outcome, Outcome) and outcome.metrics["tool_timeouts"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": ["calc"]}, "tools holds 'calc'"),
        ({"tools": [f"{HERE}:nothing"]}, "has no nothing"),
        ({"tools": [f"{HERE}:HERE"]}, "cannot be offered: it is 'tests.environments.test_tools'"),
        ({"tools": [f"{HERE}:many"]}, "cannot be offered: the argument 'texts' of many"),
        ({"tools": [f"{HERE}:call"]}, "cannot be offered: call has no docstring"),
        ({"tools": ["calculator", "calculator"]}, "two of them have the same name"),
        ({"max_calls": 0}, "max_calls = 0"),
        ({"tool_timeout_s": 0}, "tool_timeout_s = 0"),
        ({"tools": ["python"], "sandbox": "jail"}, "jail"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        Tools(**(options | changes))


# ---- schemas ----


def test_a_function_is_described_by_its_hints_and_its_docstring():
    assert tool_of(add).schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "the first number"},
                    "b": {"type": "integer", "description": "the second number, which may be left out"},
                },
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }
    assert list(tool_of(shout).schema["function"]["parameters"]["properties"]) == ["text"]
    store = tool_of(Store)
    assert store.name == "store" and [store.call(text="a"), store.call(text="b")] == [1, 2]

    def search(words: list[str], kind: str | None = None) -> None:
        """Search."""

    kinds = tool_of(search).schema["function"]["parameters"]["properties"]
    assert kinds["words"] == {"type": "array", "items": {"type": "string"}}
    assert kinds["kind"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        (True, {"type": "integer"}, "must be of the type integer, not true"),
        (2.0, {"type": "integer"}, None),
        (2.5, {"type": "integer"}, "must be of the type integer"),
        (None, {"type": ["string", "null"]}, None),
        ("c", {"enum": ["a", "b"]}, 'must be one of ["a", "b"], not "c"'),
        ([1, "x"], {"type": "array", "items": {"type": "number"}}, "[1] must be of the type number"),
        ("x", {"anyOf": [{"type": "number"}, {"type": "string"}]}, None),
        ({"a": 1}, {}, None),
    ],
)
def test_values_are_compared_with_schemas(value, schema, problem):
    found = problem_with(value, schema)
    assert found is None if problem is None else found is not None and problem in found


# ---- the calculator ----


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * (3 + 4.5)", "90"),
        ("2^10", "1024"),
        ("7 // 2 + -7 % 4", "4"),
        ("1/3", "0.333333333333"),
        ("sqrt(2) ** 2", "2"),
        ("gcd(12, 18) * pi", "18.8495559215"),
        ("10**18", "1000000000000000000"),
    ],
)
def test_the_calculator_calculates(expression, value):
    assert calculator(expression) == value


REFUSED = """
9**9**9; 10**9999 * 10**9999; __import__('os'); (1).real; 'a'*9; 1 if 1 else 2; [1]*10**9; 2+; sqrt; open(1); lambda: 1;
round(1, ndigits=2); 1e308*10; (-1)**0.5; max(); True + 1
"""


@pytest.mark.parametrize("expression", [*(one.strip() for one in REFUSED.split(";")), "(" * 300, "1" * 1001])
def test_the_calculator_refuses_what_is_no_arithmetic_or_too_large(expression):
    began = time.monotonic()
    with pytest.raises((ValueError, OverflowError)):
        calculator(expression)
    assert time.monotonic() - began < 5
