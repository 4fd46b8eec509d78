"""This module writes a few trajectories of each step as readable JSON lines to <run>/rollouts/step_000012.jsonl.

People and the report read these files; neither a checkpoint nor a resumed run needs one of them.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.printable import json_line
from fiberpo_megatron.types import Trajectory

_NAME = re.compile(r"step_([0-9]{6,12})\.jsonl")


def rollout_path(run_folder: Path, step: int) -> Path:
    """Return the file of one step."""
    return run_folder / "rollouts" / f"step_{step:06d}.jsonl"


def stored_rollouts(run_folder: Path) -> tuple[list[tuple[int, Path]], list[str]]:
    """Return (step, file) of all steps that have a file, ascending, and the names of everything else in the folder.

    Names that begin with a dot are ignored: a file has such a name while it is being written.
    """
    folder = run_folder / "rollouts"
    found, odd = [], []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        name = _NAME.fullmatch(entry.name)
        if name is not None and entry.is_file():
            found.append((int(name[1]), folder / entry.name))
        elif not entry.name.startswith("."):
            odd.append(entry.name)
    return sorted(found), sorted(odd)


def write_rollouts(
    run_folder: Path, step: int, trajectories: Sequence[Trajectory], *, count: int, domains: Sequence[str], keep: int
) -> Path | None:
    """Write `count` trajectories spread evenly over the step's; return None when there are none to write.

    A file of the same step is replaced (a resumed step). `domains` names `Prompt.domain`. Files of earlier steps are
    deleted when there are more than `keep`, see `prune_rollouts`. Raises OSError.
    """
    count = min(count, len(trajectories))
    if not count:
        return None
    chosen = [trajectories[i * len(trajectories) // count] for i in range(count)]
    path = rollout_path(run_folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replaced(path, text=True) as file:
        file.writelines(json_line(_record(step, trajectory, domains)) + "\n" for trajectory in chosen)
    prune_rollouts(run_folder, keep)
    return path


def prune_rollouts(run_folder: Path, keep: int) -> None:
    """Delete files until at most `keep` (2 or more) are left.

    The newest half stays. Of the older steps those stay that are multiples of a power of two, the smallest with which
    they fit: a selection over the whole run, step 0 included, so that the report can show how it began.
    """
    files, _ = stored_rollouts(run_folder)
    if len(files) <= keep:
        return
    old = files[: len(files) - (keep - keep // 2)]
    stride = 1
    while sum(step % stride == 0 for step, _ in old) > keep // 2:
        stride *= 2
    for step, path in old:
        if step % stride:
            path.unlink(missing_ok=True)


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
        "log_probs": [round(v, 5) if math.isfinite(v) else None for v in map(float, completion.log_probs)],
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
