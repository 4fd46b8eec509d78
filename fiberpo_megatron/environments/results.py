"""This module holds what a pool of workers answers besides outcomes: what an environment offers, and why it failed."""

from dataclasses import dataclass
from typing import Any, Literal

FailureKind = Literal["exception", "deadline", "died", "memory", "output", "invalid"]


@dataclass(frozen=True)
class Description:
    """Says what an environment's instance offers."""

    path: str
    """Import path of the class."""
    version: str | None
    """Distribution and version that it came from; None for a file of no package."""
    train_size: int
    held_out_size: int
    single_turn: bool
    """Whether the policy answers once: use `score` or `score_group`, not `run`."""
    scores: bool
    """Whether the class has `score`."""
    scores_groups: bool
    """Whether the class has `score_group`."""
    deterministic: bool
    check_all_tasks: bool
    """Whether all tasks are checked before a run starts."""
    chat_template_kwargs: dict[str, Any]
    about: str = ""
    """How the instance works, in a sentence; empty where it says nothing."""


@dataclass(frozen=True)
class Failure:
    """Says why a trajectory has no outcome; the settings' `on_failure` says what becomes of it."""

    kind: FailureKind
    """exception: the class raised; deadline: it took too long; died: it ended its process; memory: it used too much;
    output: it wrote too much; invalid: it returned something that its method must not return."""
    message: str
    """One sentence that names the environment, the task and the cause."""
    traceback: str = ""


class EnvironmentFailed(RuntimeError):
    """An environment cannot go on: it gives no task, or its workers no longer start."""
