"""This module turns evaluated trajectories into results: JSON values for each prompt, and metrics of a set.

The files lie in <run folder>/evaluations: training_000120.json is written by the run itself, step_000120.json by
`fiberpo eval RUN --follow`. Each holds the sets that were evaluated with the weights after 120 steps:

    {"step": 120, "sets": {"aime": {"settings": {...}, "metrics": {"aime/avg@8": 0.31, ...}, "prompts": [...]}}}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiberpo_megatron import durable
from fiberpo_megatron.evaluation.estimates import Estimate, clustered, majority, pass_at
from fiberpo_megatron.evaluation.settings import EvaluationSet
from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.printable import json_line
from fiberpo_megatron.telemetry.step_files import StepFiles

if TYPE_CHECKING:
    from fiberpo_megatron.types import RolloutGroup, Trajectory

IN_TRAINING = StepFiles("evaluations", "training", ".json")
BESIDE = StepFiles("evaluations", "step", ".json")
"""Results that a run writes itself, and those of `fiberpo eval RUN --follow`."""
LONGEST_TEXT = 8000
"""Characters of a response that a file keeps: its beginning and its end."""


def prompt_result(group: "RolloutGroup", domains: Sequence[str]) -> dict[str, Any]:
    """Return the result of one prompt as JSON values: what was asked, and each sample with its score.

    domains: names of the environments by `Prompt.domain`.
    """
    prompt = group.prompt
    return {
        "environment": domains[prompt.domain],
        "id": prompt.task.id,
        "prompt": shortened(prompt.text),
        "expected": prompt.task.answer,
        "samples": [_sample(trajectory) for trajectory in group.trajectories],
    }


def _sample(trajectory: "Trajectory") -> dict[str, Any]:
    completion = trajectory.completion
    mask = completion.loss_mask
    answer = trajectory.text.strip() if trajectory.answer is None else trajectory.answer
    sample: dict[str, Any] = {
        "correct": bool(trajectory.correct),
        "reward": float(trajectory.reward),
        "tokens": len(completion.token_ids) if mask is None else int(mask.sum()),
        "truncated": completion.finish_reason == "length",
        "answer": answer,
        "text": shortened(trajectory.text),
    }
    return sample if trajectory.failure is None else {**sample, "failure": trajectory.failure}


def shortened(text: str) -> str:
    """Return a text of at most about LONGEST_TEXT characters: the beginning and the end, with a note between them."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def measure(of: EvaluationSet, prompts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of a set from the results of its prompts (`prompt_result`), named NAME/avg@8 and so on.

    Shares have their 95 % interval beside them as NAME/avg@8/low and /high. A prompt all of whose samples were dropped
    takes no part; one that has fewer than k samples takes no part in pass@k.
    """
    name, n = of.name, of.samples
    found: dict[str, float] = {}
    whole = [prompt["samples"] for prompt in prompts if prompt["samples"]]
    if not whole:
        return found
    right = [[bool(sample["correct"]) for sample in samples] for samples in whole]
    _put(found, f"{name}/avg@{n}", clustered([sum(one) / len(one) for one in right]))
    for k in sorted(set(of.pass_at)):
        enough = [one for one in right if len(one) >= k]
        if enough:
            _put(found, f"{name}/pass@{k}", clustered([pass_at(len(one), sum(one), k) for one in enough]))
    if n > 1:
        votes = [[str(sample["answer"]) for sample in samples] for samples in whole]
        _put(found, f"{name}/maj@{n}", clustered([majority(*pair) for pair in zip(votes, right)]))
    flat = [sample for samples in whole for sample in samples]
    for metric, key in (
        ("reward/mean", "reward"),
        ("response_length/mean", "tokens"),
        ("truncated_share", "truncated"),
    ):
        found[f"{name}/{metric}"] = sum(float(sample[key]) for sample in flat) / len(flat)
    failed = sum("failure" in sample for sample in flat)
    return found | ({f"{name}/failed_share": failed / len(flat)} if failed else {})


def _put(found: dict[str, float], name: str, estimate: Estimate) -> None:
    found[name] = estimate.value
    if estimate.low is not None and estimate.high is not None:
        found |= {f"{name}/low": estimate.low, f"{name}/high": estimate.high}


def write_results(path: Path, step: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the results of the sets that were evaluated with the weights after `step` steps. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replaced(path, text=True) as file:
        file.write(json_line({"step": step, "sets": {name: dict(result) for name, result in sets.items()}}) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Return what `write_results` wrote. Raises ValueError that names the file for anything else."""
    try:
        found = read_object(path)
        sets = {name: {"metrics": one["metrics"], "prompts": one["prompts"]} for name, one in found["sets"].items()}
        for one in sets.values():
            for prompt in one["prompts"]:
                if not all(key in prompt for key in ("environment", "id", "prompt", "samples")):
                    raise ValueError("a prompt lacks `environment`, `id`, `prompt` or `samples`")
                [(sample["correct"], sample["text"]) for sample in prompt["samples"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of an evaluation ({error}); evaluate that step again") from error
    return {"step": int(found["step"]), "sets": sets}
