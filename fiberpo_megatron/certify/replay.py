"""This module computes the coefficients of a dumped step again, in one process, and compares them with the dump."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fiberpo_megatron.certify.compare import Difference, difference, metric_difference
from fiberpo_megatron.certify.ranks import run_ranks
from fiberpo_megatron.fibration import Objective, ObjectiveOutput, build_objective
from fiberpo_megatron.fibration.options import NOT_OPTIONS
from fiberpo_megatron.trainer.step_dump import machine
from fiberpo_megatron.trainer.step_file import DumpedStep, StepFile, StepFileError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far results of another machine, device, backend or torch build may be apart, relative to the largest entry: the
exponential there may round its last bit in another way, which the slope k of a gate in rollback multiplies."""
METRIC_TOLERANCE = 1e-4
"""The same for metrics, each relative to itself: a share of tokens may change where a token lies on a kink."""


@dataclass(frozen=True)
class Row:
    """Holds what the replay of one optimiser step found."""

    step: int
    tokens: int
    found: dict[str, Difference]
    """By result: coefficients, gated_ratio, value and metrics, as far as the file has them."""
    tolerances: dict[str, float | None]
    """By result; None demands equal bits."""
    worst: str | None
    """Which token's coefficient, or which metric, differs most; None when everything is equal."""

    @property
    def passed(self) -> bool:
        """Return whether every result is within its tolerance."""
        return all(one.within(self.tolerances[name]) for name, one in self.found.items())


@dataclass(frozen=True)
class Replay:
    """Holds the replay of a file."""

    path: Path
    objective: Objective
    bits: bool
    """Whether equal bits are demanded."""
    why: str
    """What makes this machine the dump's, or what differs."""
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Return whether every optimiser step passed."""
        return all(row.passed for row in self.rows)


def dumped_objective(file: StepFile) -> Objective:
    """Return the objective that a file names. Raises StepFileError where it names none, or one that cannot be built."""
    named = file.objective
    if named is None:
        raise StepFileError(
            f"{file.path} names no objective, so it is a file of another framework; compare it with "
            f"`fiberpo certify CONFIG --dump {file.path}`"
        )
    use, options = named
    try:
        how = {name: file.about.get(name) for name in NOT_OPTIONS}
        return build_objective(use, **how, **options)
    except ValueError as error:
        raise StepFileError(
            f"the objective of {file.path} cannot be built: {error}. Run this from the folder, or in the environment, "
            "in which the run could import it"
        ) from error


def replay(path: Path) -> Replay:
    """Compute every optimiser step of a dump again, cut over calls and ranks as in the run.

    Raises StepFileError for a file that cannot be used.
    """
    file = StepFile(path)
    objective = dumped_objective(file)
    recorded: Mapping[str, Any] = file.about.get("machine") or {}
    device = torch.device("cuda" if recorded.get("device") == "cuda" and torch.cuda.is_available() else "cpu")
    if recorded.get("device") == "cuda" and device.type == "cpu":
        objective = build_objective(objective, kernels=False)
    bits, why = same_machine(recorded, machine(objective, device))
    rows = [_row(file.step(number, objective), objective, device, bits) for number in file.steps]
    return Replay(path, objective, bits, why, rows)


def same_machine(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether two machines give equal bits, and a sentence that says why or why not."""
    if not recorded:
        return False, "the file does not say on what it was computed"
    differ = [name for name in here if recorded.get(name) != here[name]]
    if not differ:
        what = f"{here['backend']} on {here['device']} ({here['processor']}), torch {here['torch']}"
        return True, f"the run and this process use {what}"
    changes = ", ".join(f"{name} was {recorded.get(name)} and is {here[name]}" for name in differ)
    return False, f"this process differs from the run: {changes}"


def again(step: DumpedStep, objective: Objective, device: torch.device | str = "cpu") -> list[list[ObjectiveOutput]]:
    """Return the outputs of the calls of one optimiser step, by rank and in the order of the calls.

    In the single-pass way the calls have no metrics; the last output of each rank is then that of a call about all of
    its tokens, whose metrics are those that the run recorded.
    """
    tokens, ranks = step.tokens.to(device=device), step.ranks()
    if not step.single_pass:
        return [[out] for out in run_ranks(objective, tokens, ranks)]
    outputs = []
    whole = run_ranks(objective, tokens, ranks)
    for mine, calls, last in zip(ranks, step.calls, whole):
        outputs.append([tokens.take(part).call(objective, metrics=False) for part in mine.split(list(calls))] + [last])
    return outputs


def _row(step: DumpedStep, objective: Objective, device: torch.device, bits: bool) -> Row:
    outputs = again(step, objective, device)
    made = [out for rank in outputs for out in (rank[:-1] if step.single_pass else rank)]
    found = {"coefficients": difference(torch.cat([out.gradient for out in made]).cpu(), step.coefficients)}
    if step.gated_ratio is not None:
        found["gated_ratio"] = difference(torch.cat([out.gated_ratio for out in made]).cpu(), step.gated_ratio)
    if step.values is not None:
        found["value"] = difference(torch.stack([out.value.cpu() for out in made]), step.values)
    metric = None
    if step.metrics:
        last = outputs[0][-1].metrics
        assert last is not None, "the last call of a rank was asked for metrics"
        found["metrics"], metric = metric_difference(last.as_dict(), step.metrics)
    tolerances: dict[str, float | None] = {
        name: None if bits else (METRIC_TOLERANCE if name == "metrics" else TOLERANCE[step.coefficients.dtype])
        for name in found
    }
    worst = metric
    if found["coefficients"].at is not None:
        worst = step.where(found["coefficients"].at)
    elif found.get("gated_ratio") is not None and found["gated_ratio"].at is not None:
        worst = step.where(found["gated_ratio"].at)
    return Row(step.index, len(step.tokens), found, tolerances, worst)


def table(result: Replay) -> Iterator[str]:
    """Yield the lines that a person reads."""
    demanded = "equal bits" if result.bits else f"a relative difference of at most {_stated(result.rows)}"
    yield f"{result.path}: objective {result.objective.name}, {len(result.rows)} optimiser steps"
    yield f"{result.why[0].upper()}{result.why[1:]}: {demanded} is demanded."
    yield from _columns(
        ["step", "tokens", *_names(result.rows), "verdict", "worst at"],
        [
            [
                str(row.step),
                str(row.tokens),
                *(str(row.found.get(name, "-")) for name in _names(result.rows)),
                "passed" if row.passed else "DIFFERS",
                row.worst or "-",
            ]
            for row in result.rows
        ],
    )


def _stated(rows: Sequence[Row]) -> str:
    stated = {f"{name} {value:g}" for row in rows for name, value in row.tolerances.items() if value is not None}
    return ", ".join(sorted(stated))


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.found))


def _columns(heading: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[at]) for row in [heading, *rows]) for at in range(len(heading))]
    for row in [heading, *rows]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
