"""This module writes a few trajectories of each step as readable JSON lines to <run>/rollouts/step_000012.jsonl."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron.types import Trajectory


def rollout_path(run_folder: Path, step: int) -> Path:
    """Return the file of one step."""
    return run_folder / "rollouts" / f"step_{step:06d}.jsonl"


def write_rollouts(
    run_folder: Path, step: int, trajectories: Sequence[Trajectory], *, count: int, domains: Sequence[str]
) -> Path | None:
    """Write `count` trajectories spread evenly over the step's; None when there are none to write.

    A file of the same step is replaced (a resumed step). `domains` names `Prompt.domain`.
    """
    count = min(count, len(trajectories))
    if not count:
        return None
    chosen = [trajectories[i * len(trajectories) // count] for i in range(count)]
    path = rollout_path(run_folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_record(step, trajectory, domains), ensure_ascii=False) + "\n" for trajectory in chosen]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)
    return path


def _record(step: int, trajectory: Trajectory, domains: Sequence[str]) -> dict[str, Any]:
    prompt, completion = trajectory.prompt, trajectory.completion
    record = {
        "step": step,
        "domain": domains[prompt.domain],
        "index": prompt.index,
        "id": prompt.task.id,
        "prompt": prompt.text,
        "response": trajectory.text,
        "answer": prompt.task.answer,
        "reward": trajectory.reward,
        "correct": trajectory.correct,
        "finish_reason": completion.finish_reason,
        "weight_versions": [[span.version, span.start, span.end] for span in completion.weight_spans],
        "token_ids": list(completion.token_ids),
        "log_probs": [round(float(value), 5) for value in completion.log_probs],
    }
    for name, value in (
        ("metadata", dict(prompt.task.metadata)),
        ("rewards", dict(trajectory.rewards)),
        ("metrics", dict(trajectory.metrics)),
        ("failure", trajectory.failure),
    ):
        if value:
            record[name] = value
    if completion.loss_mask is not None:
        record["loss_mask"] = completion.loss_mask.astype(int).tolist()
    return record
