"""This module shows plans as Markdown, for the terminal and for docs/planning.md, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fiberpo_megatron.planning.estimate import Plan
from fiberpo_megatron.planning.parameters import active_parameters, model_parameters
from fiberpo_megatron.planning.phases import PHASES, phase_bytes
from fiberpo_megatron.planning.timing import GIGA

LAYOUT_HEADINGS = (
    "layout of the trainer",
    "engines",
    "recompute",
    "kept forwards",
    "training GB",
    "KV cache tokens",
    "step s",
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def layout_text(plan: Plan) -> str:
    """Return the layout as `tensor 2, pipeline 4, .. = 16 GPUs`; sizes of 1 are left out."""
    parallel = plan.config.parallel
    sizes = {
        name: getattr(parallel, name) or 1
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "data", "expert", "expert_tensor")
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return f"{', '.join(words) or 'one rank'} = {plan.training_gpus} GPUs"


def engines_text(plan: Plan) -> str:
    """Return the engines as `4 x tensor 2 = 8 GPUs`."""
    tensor = plan.config.rollout.engine.tensor
    beside = ", shared with training" if plan.config.rollout.engine.colocated else ""
    return f"{plan.engine_gpus // tensor} x tensor {tensor} = {plan.engine_gpus} GPUs{beside}"


def layout_row(plan: Plan) -> list[str]:
    """Return the row of a plan under LAYOUT_HEADINGS."""
    return [
        layout_text(plan),
        engines_text(plan),
        plan.config.model.recompute,
        str(plan.config.kept_forwards or "-"),
        gigabytes(plan.largest.total),
        f"{plan.engine.cache_tokens:,}",
        f"{plan.time.total:.0f}",
    ]


def gigabytes(number: float) -> str:
    """Return a number of bytes in units of 10^9."""
    return f"{number / GIGA:.2f}"


def plan_text(plan: Plan, fuller: Plan | None = None) -> str:
    """Return the whole plan as Markdown.

    fuller: the same plan with as many kept forward passes as fit, if it is to be compared.
    """
    time, work = plan.time, plan.work
    stages = [
        [
            str(stage.stage),
            *(gigabytes(part) for part in (stage.states.parameters, stage.states.gradients, stage.states.optimizer)),
            *(gigabytes(part) for part in (stage.activations, stage.log_probs, stage.reserved, stage.total)),
        ]
        for stage in plan.stages
    ]
    headings = ("stage", "parameters", "gradients", "optimizer", "activations", "log-probs", "reserved", "total")
    phases = [[f"{value:.1f}" for value in (*asdict(time).values(), time.total)]]
    verdict = "It fits." if not plan.problems else "It does not fit:\n" + "\n".join(f"- {p}" for p in plan.problems)
    return "\n".join(
        [
            f"{plan.architecture.model_type}: {model_parameters(plan.architecture) / GIGA:.2f}e9 parameters, "
            f"{active_parameters(plan.architecture) / GIGA:.2f}e9 active per token; {plan.gpu.name} with "
            f"{plan.memory / GIGA:.0f} GB",
            f"training: {layout_text(plan)}; engines: {engines_text(plan)}",
            f"step: {work.trajectories} trajectories of {work.prompt_tokens:.0f} + {work.response_tokens:.0f} tokens, "
            f"{work.optimiser_steps} optimiser steps of {work.micro_batches} micro-batches a rank",
            "",
            "GB on a training GPU (the fullest of each stage):",
            "",
            table(headings, stages),
            "",
            f"engine, per GPU: {gigabytes(plan.engine.weights)} GB of weights, {gigabytes(plan.engine.cache)} GB of KV "
            f"cache = {plan.engine.cache_tokens:,} tokens (longest trajectory: {plan.engine.longest:,})",
            *_host_line(plan),
            *_phase_lines(plan),
            f"publication: {gigabytes(plan.publish)} GB to every engine; gates: "
            f"{' + '.join(f'{size:,}' for size in plan.gates)} bytes all-reduced in an optimiser step",
            "",
            "Estimated seconds of a step:",
            "",
            table((*(name.replace("_", " ") for name in asdict(time)), "total"), phases),
            "",
            *_notes(plan, fuller),
            verdict,
        ]
    )


def _host_line(plan: Plan) -> list[str]:
    """Return a line about the host memory that ranks take, where they keep anything there."""
    largest = max(stage.host for stage in plan.stages)
    if not largest:
        return []
    reference = max(stage.reference for stage in plan.stages)
    beside = f" ({gigabytes(reference)} GB of it for the reference of [algorithm.kl])" if reference else ""
    return [f"host memory: {gigabytes(largest)} GB for each training GPU of the fullest stage{beside}"]


def _phase_lines(plan: Plan) -> list[str]:
    """Return a table with the peaks of every phase: GB on the GPU, and in host memory of a rank and of a leader."""
    peaks = phase_bytes(plan)
    rows = []
    for stage in plan.stages:
        found = [peak for peak in peaks if peak.stage == stage.stage]
        rows.append([f"{stage.stage}: GPU", *(gigabytes(peak.device) for peak in found)])
        rows.append([f"{stage.stage}: host", *(gigabytes(peak.host) for peak in found)])
        if stage.stage == 0:
            rows.append(["0: host of a leader", *(gigabytes(peak.leader) for peak in found)])
    return ["", "GB of a training rank at the peak of each phase:", "", table(("stage", *PHASES), rows), ""]


def _notes(plan: Plan, fuller: Plan | None) -> list[str]:
    """Return a line for what the phases alone do not say, and an empty one behind them."""
    time, notes = plan.time, []
    if time.checkpoint:
        every, share = plan.config.checkpoint.every_steps, 100 * time.checkpoint / time.total
        notes.append(f"checkpoints (every {every} steps) take {share:.1f} % of the time")
    if time.hidden:
        notes.append(
            f"{time.hidden:.1f} s of the phases pass beside others: training, or other steps' generation; "
            f"the trainer waits {time.wait:.1f} s a step"
        )
    if fuller is not None and (saved := time.total - fuller.time.total) > 0:
        kept, full = fuller.config.batch.kept_forwards, gigabytes(fuller.largest.total)
        notes.append(
            f"batch.kept_forwards = {kept} fits as well, with {full} GB on the fullest GPU, and saves {saved:.1f} s of "
            f"a step ({100 * saved / time.total:.1f} %)"
        )
    return [*notes, ""] if notes else []


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the whole plan as numbers, in bytes and seconds."""
    return {
        "fits": not plan.problems,
        "problems": plan.problems,
        "parallel": plan.config.parallel.model_dump(),
        "recompute": plan.config.model.recompute,
        "kept_forwards": plan.config.kept_forwards,
        "most_kept_forwards": plan.most_kept_forwards,
        "training_gpus": plan.training_gpus,
        "engine_gpus": plan.engine_gpus,
        "colocated": plan.config.rollout.engine.colocated,
        "stages": [asdict(stage) | {"total": stage.total, "host": stage.host} for stage in plan.stages],
        "phases": [asdict(peak) for peak in phase_bytes(plan)],
        "engine": asdict(plan.engine) | {"cache_tokens": plan.engine.cache_tokens},
        "publish_bytes": plan.publish,
        "gate_bytes": list(plan.gates),
        "seconds": asdict(plan.time) | {"total": plan.time.total},
    }
