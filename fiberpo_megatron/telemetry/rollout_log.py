"""This module writes a few trajectories of each step as readable JSON lines to <run>/rollouts/step_000012.jsonl, and
some of each evaluation to <run>/rollouts/eval_000012.jsonl.

People, the report and the live page read these files; neither a checkpoint nor a resumed run needs one of them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiberpo_megatron import durable
from fiberpo_megatron.printable import json_line
from fiberpo_megatron.telemetry.step_files import StepFiles

if TYPE_CHECKING:  # the live page reads these files without torch
    from fiberpo_megatron.types import Completion, Trajectory

ROLLOUTS = StepFiles("rollouts", "step", ".jsonl")
EVALUATIONS = StepFiles("rollouts", "eval", ".jsonl")
"""Their step is the number of steps done: that of the weights that were evaluated."""


def stored_rollouts(run_folder: Path) -> tuple[list[tuple[int, Path]], list[str]]:
    """Return (step, file) of all steps that have a file, ascending, and the names in the folder that are neither that
    of a step's file nor that of an evaluation's.

    Names that begin with a dot are ignored: a file has such a name while it is being written.
    """
    files, odd = ROLLOUTS.stored(run_folder)
    evaluations, _ = EVALUATIONS.stored(run_folder)
    return files, sorted(set(odd) - {path.name for _, path in evaluations})


def write_records(
    run_folder: Path, step: int, records: Sequence[Mapping[str, Any]], *, keep: int, files: StepFiles = ROLLOUTS
) -> Path | None:
    """Write records of trajectories (`trajectory_record`) as a step's file; return None when there are none.

    A file of the same step is replaced (a resumed step). Files of earlier steps are deleted when there are more than
    `keep`, see `StepFiles.prune`. Raises OSError.
    """
    if not records:
        return None
    path = files.path(run_folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replaced(path, text=True) as file:
        file.writelines(json_line(record) + "\n" for record in records)
    files.prune(run_folder, keep)
    return path


def trajectory_record(step: int, place: int, trajectory: "Trajectory", domains: Sequence[str]) -> dict[str, Any]:
    """Return a trajectory as JSON values; `place` is its number among the step's trajectories, from 0."""
    prompt, completion = trajectory.prompt, trajectory.completion
    record: dict[str, Any] = {
        "step": step,
        "trajectory": place,
        "domain": domains[prompt.domain],
        "index": prompt.index,
        "id": prompt.task.id,
        "prompt": prompt.text,
        "response": trajectory.text,
        "answer": prompt.task.answer,
        "reward": trajectory.reward,
        "correct": trajectory.correct,
        **_sampled(completion),
    }
    for name, value in (
        ("metadata", dict(prompt.task.metadata)),
        ("rewards", dict(trajectory.rewards)),
        ("metrics", dict(trajectory.metrics)),
        ("failure", trajectory.failure),
    ):
        if value:
            record[name] = value
    if trajectory.branches:
        record["branches"] = [
            {"prompt_ids": list(branch.prompt_ids), **_sampled(branch.completion)} for branch in trajectory.branches
        ]
    return record


def _sampled(completion: "Completion") -> dict[str, Any]:
    record: dict[str, Any] = {
        "finish_reason": completion.finish_reason,
        "weight_versions": [[span.version, span.start, span.end] for span in completion.weight_spans],
        "token_ids": list(completion.token_ids),
        "log_probs": [round(v, 5) if math.isfinite(v) else None for v in map(float, completion.log_probs)],
    }
    if completion.loss_mask is not None:
        record["loss_mask"] = completion.loss_mask.astype(int).tolist()
    return record
