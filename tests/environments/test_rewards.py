"""Components with weights, formats with a time bound, comparisons within a group, and the soft penalty for length."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Trajectory, Turn
from fiberpo_megatron.environments.formats import FormatCheck
from fiberpo_megatron.environments.group_rewards import Shorter, with_group_reward
from fiberpo_megatron.environments.host import EnvironmentFailed, EnvironmentPool
from fiberpo_megatron.environments.loading import load
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.plugins import PluginError
from fiberpo_megatron.rollout.rewards import weighted_reward
from fiberpo_megatron.trainer.overlong import overlong_penalty


def environment(**settings: object) -> EnvironmentConfig:
    return EnvironmentConfig.model_validate({"name": "sums", "use": "tests.environments.test_rewards:Four", **settings})


class Four(SingleTurn):
    """Two and two, with components and the canonical answer."""

    train_size = 1

    def train(self, index: int) -> Task:
        return Task("2+2=", "4")

    def score(self, task: Task, turn: Turn) -> Outcome:
        right = turn.text.endswith("4")
        return Outcome(float(right), {"right": float(right)}, answer=turn.text[-1:])


class Doubled:
    """A comparison of the user's own: all rewards twice."""

    def __call__(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Outcome]:
        return [replace(one.outcome, reward=2 * one.outcome.reward) for one in trajectories]


def test_the_reward_is_the_weighted_sum_of_its_components():
    outcome = Outcome(0.5, {"right": 1.0, "format": 0.0})
    assert weighted_reward(environment(), "t", outcome) == 0.5
    weights = {"right": 2.0, "format": 0.5, "reward": 1.0}
    assert weighted_reward(environment(reward_weights=weights), "t", outcome) == 2.5
    assert weighted_reward(environment(reward_weights={"right": 2.0, "format": 0.5}), "t", outcome) == 2.0
    with pytest.raises(EnvironmentFailed, match=r"'sums': reward_weights has 'rihgt'.* only reward, right, format"):
        weighted_reward(environment(reward_weights={"rihgt": 1.0}), "t", outcome)
    with pytest.raises(EnvironmentFailed, match=r"component 'format', for which reward_weights has no weight"):
        weighted_reward(environment(reward_weights={"right": 1.0}), "t", outcome)


@pytest.mark.parametrize(
    ("name", "text", "has"),
    [
        ("think", "<think>2 and 2</think> 4", True),
        ("think", "the prompt began it</think>4", True),
        ("think", "4", False),
        ("think", "<think>a</think>", False),
        ("think", "a<think>b</think>c", False),
        ("think", "a</think>b</think>c", False),
        ("boxed", r"so \boxed{\frac{1}{2}}.", True),
        ("boxed", r"\boxed{ }", False),
        ("boxed", r"\boxed{{4}", False),
        ("boxed", "4", False),
    ],
)
def test_named_formats(name: str, text: str, has: bool):
    assert FormatCheck(name)(text) == ({"format": float(has)}, {})


def test_a_search_that_would_never_end_is_ended():
    check, began = FormatCheck({"pattern": "(a+)+$", "timeout_s": 0.1}), time.monotonic()
    assert check("a" * 50 + "b") == ({"format": 0.0}, {"format_timeout": 1.0})
    assert time.monotonic() - began < 10.0  # it would take years; the machine may be busy
    assert check("aaa") == ({"format": 1.0}, {"format_timeout": 0.0})


def trajectory(tokens: int, right: bool) -> Trajectory:
    return Trajectory((Turn("4", token_ids=(1,) * tokens),), Outcome(float(right), correct=right, answer="4"))


def test_shorter_answers_are_preferred_and_wrong_ones_are_not_rewarded():
    group = [trajectory(10, True), trajectory(20, True), trajectory(30, True), trajectory(10, False)]
    outcomes = Shorter()(Task("?"), group)
    assert [outcome.rewards["shorter"] for outcome in outcomes] == [0.5, 0.0, -0.5, 0.0]
    assert [outcome.answer for outcome in outcomes] == ["4"] * 4, "what it does not change stays"
    assert [o.rewards["shorter"] for o in Shorter()(Task("?"), group[:1] * 2)] == [0.0, 0.0]


def test_a_comparison_comes_after_the_environments_own():
    class Own(Four):
        def score_group(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Outcome]:
            return [replace(one.outcome, reward=one.outcome.reward + 1) for one in trajectories]

    own = Own()
    with_group_reward(own, Doubled())
    found = own.score_group(Task("?"), [trajectory(1, True), trajectory(1, False)])
    assert [outcome.reward for outcome in found] == [4.0, 2.0]


def test_a_worker_adds_format_and_comparison_and_returns_the_answer():
    async def ask() -> None:
        pool = EnvironmentPool(environment(workers=1, format="boxed", group_reward="shorter"), folder=None)
        try:
            described = await pool.start()
            assert described.scores and described.scores_groups
            (task,) = await pool.tasks("train", [0])
            turns = [Turn(r"\boxed{4} 4", token_ids=(1, 2)), Turn("5", token_ids=(1, 2, 3))]
            outcomes = [await pool.score(task, turn, seed=1) for turn in turns]
            assert all(isinstance(outcome, Outcome) for outcome in outcomes)
            seen = [Trajectory((turn,), outcome) for turn, outcome in zip(turns, outcomes)]  # type: ignore[arg-type]
            found = await pool.score_group(task, seen, seed=1)
            assert isinstance(found, list)
            assert [o.rewards for o in found] == [
                {"right": 1.0, "format": 1.0, "shorter": 0.5},
                {"right": 0.0, "format": 0.0, "shorter": -0.5},
            ]
            assert [o.answer for o in found] == ["4", "5"]
        finally:
            await pool.close()

    asyncio.run(ask())


def test_a_comparison_that_does_not_exist_is_refused():
    settings = {"name": "sums", "use": "tests.environments.test_rewards:Four", "options": {}, "version": None}
    with pytest.raises(PluginError, match=r"group_reward.*is neither a short name.*did you mean 'shorter'"):
        load({**settings, "group_reward": {"use": "shortr", "options": {}, "version": None}})


def test_the_soft_penalty_of_long_responses():
    """Equation 13 of arXiv:2503.14476, with DAPO's numbers."""
    lengths = np.array([100, 16384, 18432, 20480, 30000])
    assert overlong_penalty(lengths, 20480, 4096).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
