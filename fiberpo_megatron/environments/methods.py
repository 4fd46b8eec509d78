"""This module turns the jobs that call a method once into calls of an environment, and their results into JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fiberpo_megatron.environments import Environment, Outcome, Task, Trajectory, wire
from fiberpo_megatron.environments.formats import COMPONENT, FormatCheck
from fiberpo_megatron.environments.wire import InvalidReply, Kind
from fiberpo_megatron.environments.worker_jobs import Job

Bound = tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any], Any]]
"""A method to call, its arguments, and what turns its result into JSON values."""


class Methods:
    """Holds the environment of a worker, and the check of the format that its answers must have.

    form: the setting `format` of the environment; None: answers need no format.
    """

    def __init__(self, environment: Environment, form: Any) -> None:
        self._environment: Any = environment
        self._format = None if form is None else FormatCheck(form)

    def bind(self, job: Job) -> Bound:
        """Return the call that a job stands for; its payload is read and dropped, its seed is set."""
        fields = json.loads(job.payload)
        job.payload = b""
        environment = self._environment
        if job.kind == Kind.TASK:
            split, index = fields["split"], fields["index"]
            job.seed = index
            method = environment.train if split == "train" else environment.held_out
            return method, (index,), lambda value: wire.task_to_json(wire.checked_task(value, f"{split}({index})"))
        job.seed = fields["seed"]
        task = Task(**fields["task"])
        if job.kind == Kind.SCORE:
            turn = wire.turn_from_json(fields["turn"])
            return environment.score, (task, turn), lambda value: self.outcome(value, "score()", turn.text, bare=True)
        trajectories = [wire.trajectory_from_json(one) for one in fields["trajectories"]]

        def outcomes(value: Any) -> list[dict[str, Any]]:
            if not isinstance(value, Sequence) or len(value) != len(trajectories):
                raise InvalidReply(
                    f"score_group() returned {wire.short(value)}; return a list with one Outcome for each of the "
                    f"{len(trajectories)} trajectories"
                )
            return [self._of_group(one, place, seen) for place, (one, seen) in enumerate(zip(value, trajectories))]

        return environment.score_group, (task, trajectories), outcomes

    def outcome(self, value: Any, method: str, text: str, *, bare: bool) -> dict[str, Any]:
        """Return the checked outcome of a trajectory whose last turn has this text, with its format, as JSON values.

        bare: a number may stand for an outcome. Raises InvalidReply.
        """
        outcome = wire.checked_outcome(value, method, bare=bare)
        if self._format is not None:
            if COMPONENT in outcome.rewards:
                raise InvalidReply(
                    f"`rewards` of {method} has the component {COMPONENT!r}, which the setting `format` adds; rename "
                    "it, or leave the setting out"
                )
            outcome = _with_format(outcome, *self._format(text))
        return wire.outcome_to_json(outcome)

    def _of_group(self, value: Any, place: int, seen: Trajectory) -> dict[str, Any]:
        """Return the checked outcome that a group gave to the trajectory `seen`; its format stays what it was."""
        outcome = wire.checked_outcome(value, f"score_group()[{place}]", bare=False)
        if self._format is not None and COMPONENT not in outcome.rewards:
            known = seen.outcome.rewards.get(COMPONENT)
            found = self._format(seen.turns[-1].text) if known is None else ({COMPONENT: known}, {})
            outcome = _with_format(outcome, *found)
        return wire.outcome_to_json(outcome)


def _with_format(outcome: Outcome, rewards: Mapping[str, float], metrics: Mapping[str, float]) -> Outcome:
    return replace(outcome, rewards={**outcome.rewards, **rewards}, metrics={**outcome.metrics, **metrics})
