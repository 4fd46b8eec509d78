"""These tests run environments of the verifiers package in its own interpreter, with policies that are written here.

`make verifiers` makes the interpreter; `make test-all` does it too. Without it the tests are skipped.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.environments import Outcome, Task, ToolCall, Turn
from fiberpo_megatron.environments.builtin.verifiers import VERSION, Verifiers
from fiberpo_megatron.environments.host import EnvironmentPool
from fiberpo_megatron.environments.jobs import Say
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.plugins import PluginError

PYTHON = Path(sys.prefix) / f"verifiers-{VERSION}/bin/python"
needs_verifiers = pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; run `make verifiers`")
NAME = "tests.environments.verifiers_arithmetic"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64}


class Script:
    """Says these turns, in whatever branch, and remembers what it was told."""

    def __init__(self, *turns: Turn | str) -> None:
        self.left = list(turns)
        self.said: list[tuple[Any, Any]] = []
        self.branches: list[int] = []

    async def say(self, new: Any, tools: Any, max_tokens: Any, stop: Any, branch: Any = None) -> Turn:
        self.said.append((new, tools))
        self.branches.append(0 if branch is None else branch.number)
        turn = self.left.pop(0)
        return Turn(turn) if isinstance(turn, str) else turn


def talked(options: dict[str, Any], use: Callable[[EnvironmentPool], Any]) -> Any:
    """Return what `use` finds out with the workers of an environment."""
    arguments = {"environment": NAME, **options}
    config = EnvironmentConfig(
        name="vf",
        use="verifiers",
        python=PYTHON,
        options=arguments,
        workers=1,
        start_timeout_s=600.0,
        deadline_s=60.0,
    )

    async def run() -> Any:
        pool = EnvironmentPool(config, folder=None)
        try:
            await pool.start()
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


async def outcome(pool: EnvironmentPool, script: Script, index: int = 3) -> tuple[Task, Any]:
    (task,) = await pool.tasks("train", [index])

    def converse() -> Say:
        return script.say

    return task, await pool.run(task, converse, seed=0, sampling=SAMPLING)


@needs_verifiers
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_environments_of_the_package_hold_and_score_conversations():
    """Single turns, tools and several turns, each in one worker of its own: the starts take most of the time."""

    async def single(pool: EnvironmentPool) -> None:
        (held_out,) = await pool.tasks("held_out", [0])
        assert held_out.prompt[1]["content"] == "What is 70 + 1?"
        script = Script("4")
        task, found = await outcome(pool, script)
        assert task.prompt == [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is 3 + 1?"}]
        assert task.answer == "4" and script.said == [(task.prompt, None)]
        assert found == Outcome(
            1.5, {"same": 1.0, "brevity": 1.0, "num_turns": 1.0}, correct=True, metrics={"branches": 0.0}
        )
        _, wrong = await outcome(pool, Script("x" * 200))
        assert wrong.reward == 0 and wrong.correct is False

    async def tools(pool: EnvironmentPool) -> None:
        call = Turn("Let me add.", tool_calls=(ToolCall("add", json.dumps({"a": 3, "b": 1}), "c1"),))
        script = Script(call, "4")
        _, found = await outcome(pool, script)
        (first, described), (second, _) = script.said
        assert [tool["function"]["name"] for tool in described] == ["add"] and first[1]["role"] == "user"
        (answer,) = second
        assert (answer["role"], answer["content"], answer["tool_call_id"]) == ("tool", "4", "c1")
        assert found.reward == 1.5 and found.rewards["num_turns"] == 2 and found.metrics["branches"] == 0

    async def insist(pool: EnvironmentPool) -> None:
        script = Script("5", "3", "4")
        _, found = await outcome(pool, script)
        assert [new for new, _ in script.said[1:]] == [[{"role": "user", "content": "Are you sure?"}]] * 2
        assert script.branches == [0, 0, 0] and found.reward == 1.5 and found.rewards["num_turns"] == 3

    async def rewrite(pool: EnvironmentPool) -> None:
        script = Script("5", "3", "4")
        _, found = await outcome(pool, script)
        assert script.branches == [0, 1, 2] and found.metrics["branches"] == 2 and found.reward == 1.5

    talked({"held_out_size": 1}, single)
    talked({"arguments": {"kind": "tools"}}, tools)
    talked({"arguments": {"kind": "insist"}}, insist)
    talked({"arguments": {"kind": "rewrite"}}, rewrite)


@needs_verifiers
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_what_does_not_fit_is_refused_before_anything_starts():
    async def nothing(pool: EnvironmentPool) -> None:
        raise AssertionError("it was not refused")

    for options, message in (
        ({"environment": "no_such_thing"}, "environment = 'no_such_thing' could not be loaded"),
        ({"arguments": {"sort": 1}}, "unexpected keyword argument 'sort'"),
        ({"arguments": {"kind": "group"}}, "rewards that compare the samples of one task"),
        ({"held_out_size": 2}, "has 20 training tasks, and 1 evaluation tasks of its own"),
    ):
        with pytest.raises(PluginError, match=message):
            talked(options, nothing)

    async def split(pool: EnvironmentPool) -> None:
        tasks = [*(await pool.tasks("train", range(15))), *(await pool.tasks("held_out", range(5)))]
        assert len({task.answer for task in tasks}) == 20

    talked({"arguments": {"evaluation": False}, "held_out_size": 5}, split)


def test_without_the_package_its_place_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ValueError, match=f"pip install verifiers=={VERSION}.* name it in `python ="):
        Verifiers("anything")
    with pytest.raises(ValueError, match="held_out_size = -1"):
        Verifiers("anything", held_out_size=-1)
