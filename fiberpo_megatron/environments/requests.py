"""This module says what a worker is asked for each method of an environment, and reads its answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.environments import Outcome, Split, Task, Trajectory, Turn, wire
from fiberpo_megatron.environments.settings import EnvironmentConfig, FormatPattern
from fiberpo_megatron.environments.wire import InvalidReply, Kind
from fiberpo_megatron.plugins import PluginError


@dataclass(frozen=True)
class Request:
    """Holds one call of a method of the environment."""

    kind: Kind
    fields: dict[str, Any]
    """The arguments as JSON values."""
    what: str
    """The call in words, for messages."""
    task: Task | None
    seed: int
    decode: Callable[[Any], Any]
    """Turns the JSON values of the result into what the caller gets; it raises InvalidReply."""


def task_request(name: str, split: Split, index: int) -> Request:
    """Return the request for a task of the environment `name`; a task without an id is named by its place."""

    def decode(fields: Any) -> Task:
        identity = fields["id"] or f"{name}/{split}/{index}"
        return Task(fields["prompt"], fields["answer"], fields["metadata"], identity)

    return Request(Kind.TASK, {"split": split, "index": index}, f"{split}({index})", None, index, decode)


def score_request(task: Task, turn: Turn, seed: int) -> Request:
    """Return the request for `score` of one answer."""
    fields = {"task": wire.task_to_json(task), "turn": wire.turn_to_json(turn), "seed": seed}
    return Request(
        Kind.SCORE, fields, f"score() of task {task.id}", task, seed, lambda value: _outcome(value, "score()")
    )


def group_request(task: Task, trajectories: Sequence[Trajectory], seed: int) -> Request:
    """Return the request for `score_group` of all trajectories of a task."""
    count = len(trajectories)
    found = list(map(wire.trajectory_to_json, trajectories))

    def decode(values: Any) -> list[Outcome]:
        if not isinstance(values, list) or len(values) != count:
            raise InvalidReply(f"score_group() gave no list of {count} outcomes")
        return [_outcome(value, "score_group()") for value in values]

    fields = {"task": wire.task_to_json(task), "trajectories": found, "seed": seed}
    return Request(Kind.GROUP, fields, f"score_group() of task {task.id}", task, seed, decode)


def run_request(task: Task, seed: int, sampling: Mapping[str, float] | None) -> Request:
    """Return the request for `run`: one conversation about a task. `sampling` is what `Conversation.sampling` says."""
    fields = {"task": wire.task_to_json(task), "seed": seed, "sampling": dict(sampling or {})}
    return Request(Kind.RUN, fields, f"run() of task {task.id}", task, seed, lambda value: _outcome(value, "run()"))


def worker_settings(config: EnvironmentConfig) -> bytes:
    """Return the settings that a new worker gets first. Raises PluginError for options that are no JSON values."""
    try:
        options = wire.plain(config.options, "options")
        group = None
        if config.group_reward is not None:
            group = wire.plain(dict(config.group_reward), "group_reward")
    except InvalidReply as error:
        raise PluginError(f"environment {config.name!r}: {error}") from error
    settings = {
        "name": config.name,
        "use": config.use,
        "options": options,
        "version": config.version,
        "deadline_s": config.deadline_s,
        "memory_gib": config.memory_gib,
        "output_kib": config.output_kib,
        "format": config.format.model_dump() if isinstance(config.format, FormatPattern) else config.format,
        "group_reward": group,
    }
    return wire.encode(settings)


def _outcome(fields: Any, method: str) -> Outcome:
    """Return the outcome with these fields. Raises InvalidReply."""
    if not isinstance(fields, dict) or set(fields) != {"reward", "rewards", "correct", "metrics", "answer"}:
        raise InvalidReply(f"the reply to {method} is no Outcome")
    return wire.checked_outcome(Outcome(**fields), method, bare=False)
