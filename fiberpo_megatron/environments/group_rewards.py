"""This module has rewards that compare the samples of a task with each other (`group_reward` of [[environments]]).

A class of your own is called with the task and its trajectories, and returns their outcomes in the same order; keep
what it does not change with `dataclasses.replace`. This module imports the standard library alone and runs on Python
3.10.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fiberpo_megatron.environments import Environment, Outcome, Task, Trajectory


class GroupReward(Protocol):
    """Compares all samples of a task that did not fail."""

    def __call__(self, task: Task, trajectories: Sequence[Trajectory]) -> Sequence[Outcome]:
        """Return the outcomes of the trajectories, in their order."""
        ...


class Shorter:
    """Adds the component "shorter", which prefers short answers among the samples of a task (arXiv:2501.12599, section
    2.3.3).

    With the shortest and the longest length of the group, in tokens that the policy sampled, it is

        0.5 - (length - shortest) / (longest - shortest)

    for a right answer, the smaller one of that and 0 for a wrong one, and 0 where all are equally long.
    """

    def __call__(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Outcome]:
        """Return the outcomes with the component."""
        lengths = [sum(len(turn.token_ids) for turn in trajectory.turns) for trajectory in trajectories]
        shortest, longest = min(lengths), max(lengths)
        outcomes = []
        for trajectory, length in zip(trajectories, lengths):
            outcome = trajectory.outcome
            value = 0.0 if longest == shortest else 0.5 - (length - shortest) / (longest - shortest)
            right = outcome.reward > 0 if outcome.correct is None else outcome.correct
            rewards = {**outcome.rewards, "shorter": value if right else min(0.0, value)}
            outcomes.append(replace(outcome, rewards=rewards))
        return outcomes


def with_group_reward(environment: Environment, reward: GroupReward) -> None:
    """Let `reward` see what `score_group` of an environment returns, or the single outcomes where it has none."""
    own = getattr(environment, "score_group", None)

    def compare(task: Task, trajectories: Sequence[Trajectory], outcomes: Sequence[Outcome]) -> Any:
        seen = [replace(one, outcome=outcome) for one, outcome in zip(trajectories, outcomes, strict=True)]
        return reward(task, seen)

    def score_group(task: Task, trajectories: Sequence[Trajectory]) -> Any:
        found = [one.outcome for one in trajectories] if own is None else own(task, trajectories)
        if not inspect.isawaitable(found):
            return compare(task, trajectories, found)

        async def later(outcomes: Awaitable[Sequence[Outcome]]) -> Any:
            compared = compare(task, trajectories, await outcomes)
            return await compared if inspect.isawaitable(compared) else compared

        return later(found)

    environment.score_group = score_group  # type: ignore[attr-defined]
