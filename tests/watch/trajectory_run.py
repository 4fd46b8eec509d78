"""A run folder with trajectories and token records, written as a run writes them, whose contents tests know."""

from pathlib import Path
from typing import Any

from fiberpo_megatron.telemetry.rollout_log import EVALUATIONS, write_records
from fiberpo_megatron.telemetry.token_log import write_tokens
from tests.watch.serving import write_run

TRAJECTORIES = (0, 8, 16, 24)


def text_line(step: int, number: int) -> dict[str, Any]:
    """The line of one trajectory in rollouts/."""
    return {
        "step": step,
        "trajectory": number,
        "domain": "sums" if number < 16 else "words",
        "index": number,
        "id": f"{'sums' if number < 16 else 'words'}/{number}",
        "prompt": f"prompt {number} <b>&amp;",
        "response": f"words {number} <img src=x onerror=alert(1)>",
        "answer": "wanted",
        "reward": {0: 0.5, 8: 0.25, 16: 1.0, 24: 0.0}[number],
        "correct": number in (0, 16),
        "finish_reason": "length" if number == 24 else "stop",
        "weight_versions": [[str(max(0, step - 2 * (number == 16))), 0, 4]],
        "token_ids": [7] * (4 if number == 8 else 5),
        "log_probs": [-1.0] * 5,
    }


def token_line(step: int, number: int) -> dict[str, Any]:
    """The line of one trajectory in tokens/: its second token is stopped by a level, its third by the clip, and the
    fourth was written by the environment. Trajectory 8 has no fifth."""
    size = 4 if number == 8 else 5
    line = text_line(step, number)
    pieces = [f"words {number}", " <img src=x onerror=alert(1)>", "", "", ""][:size]
    tokens: dict[str, list[Any]] = {
        "id": line["token_ids"],
        "text": pieces,
        "sampled": [1, 1, 1, 0, 1][:size],
        "rollout_log_prob": [-0.5, -0.25, -1.0, 0.0, -1.0][:size],
        "weight_version": [step, step, step, -1, step][:size],
        "engine": [0, 0, 1, -1, 0][:size],
        "log_prob": [-0.5, -0.25, -1.0, None, -1.0][:size],
        "entropy": [0.1, 0.9, 1.4, None, 0.2][:size],
        "advantage": [1.0, 1.0, 1.0, None, 1.0][:size],
        "weight": [0.01, 0.01, 0.01, None, 0.01][:size],
        "gated_ratio": [1.1, 1.0, 1.05, None, 1.0][:size],
        "free": [1, 1, 0, None, 1][:size],
        "clip_figure": [0, 0, 0, None, 0][:size],
        "clip_value": [0.01, 0.02, 0.3, None, -0.01][:size],
        "clip_low": [-0.05, -0.05, -0.05, None, -0.05][:size],
        "clip_high": [0.05, 0.05, 0.05, None, 0.05][:size],
        "log_ratio": [[0.0, 0.0, 0.0, None, 0.0][:size], [-0.1, 0.3, 0.6, None, -0.01][:size]],
        "coefficient": [[0.01, 0.01, 0.01, None, 0.01][:size], [0.011, 0.002, 0.0, None, 0.01][:size]],
    }
    node = {"id": {"trajectory": number}, "S": [0.31, 0.02], "D": [0.31, 0.02], "C": [0.12, 0.1], "k": 4.0}
    return {
        "step": step,
        "trajectory": number,
        "objective": "fiberpo",
        "group": number // 8,
        **{name: line[name] for name in ("domain", "reward", "correct", "prompt")},
        "truncated": number == 24,
        "prompt_tokens": 3,
        "tokens": tokens,
        "mini_batch": 0,
        "mini_batches": 1,
        "clip_figures": ["residual"],
        "levels": [
            {
                "name": "trajectory",
                "keys": ["trajectory"],
                "nodes": [{**node, "state": ["zeroed", "pass"]}],
                "of": [0, 0, 0, None, 0][:size],
            }
        ],
    }


def write_trajectories(folder: Path) -> Path:
    """Write the run: training steps 0 (without records of tokens), 4 and 5, and two evaluations."""
    write_run(folder, 6)
    for step in (0, 4, 5):
        write_records(folder, step, [text_line(step, number) for number in TRAJECTORIES], keep=99)
        if step:
            write_tokens(folder, step, [token_line(step, number) for number in TRAJECTORIES], keep=99)
    for step in (0, 4):
        lines = [{**text_line(step, number), "response": f"after {step}: {number}"} for number in TRAJECTORIES]
        write_records(folder, step, lines[: 4 - step // 4], keep=99, files=EVALUATIONS)
    return folder


def write_branches(folder: Path) -> Path:
    """Write a run of one step, whose only trajectory has a branch: its prompt is the third of five tokens."""
    write_run(folder, 6)
    branch = {"prompt_ids": [7], "token_ids": [7, 7], "finish_reason": "length"}
    write_records(folder, 5, [{**text_line(5, 0), "token_ids": [7, 7], "branches": [branch]}], keep=9)
    write_tokens(folder, 5, [{**token_line(5, 0), "branches": [2]}], keep=9)
    return folder
