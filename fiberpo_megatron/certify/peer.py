"""This module says whether our objective gives the coefficients that a file of another framework holds."""

from dataclasses import dataclass

import torch

from fiberpo_megatron.certify.checks import Check
from fiberpo_megatron.certify.compare import difference
from fiberpo_megatron.fibration import Objective
from fiberpo_megatron.trainer.step_file import DumpedStep

PART = "The file's coefficients beside ours"
WORST = 10
"""Tokens that are listed."""


@dataclass(frozen=True)
class Offender:
    """Describes one token whose coefficients differ."""

    where: str
    log_ratio: float
    advantage: float
    theirs: float
    ours: float


@dataclass(frozen=True)
class PeerComparison:
    """Holds how the coefficients of one optimiser step compare with ours."""

    check: Check
    worst: list[Offender]
    """The tokens that differ most, the first one most; empty when all are within the tolerance."""
    hint: str | None
    """What would explain the difference: a common factor; None if none does."""


def compare_peer(step: DumpedStep, objective: Objective, tolerance: float) -> PeerComparison:
    """Compare a file's coefficients with those of one call of `objective` about the same tokens.

    `tolerance` is the largest difference that passes, relative to the largest of our coefficients.
    """
    out = step.tokens.call(objective, metrics=False)
    ours, theirs = out.gradient.double(), step.coefficients.double()
    found = {"coefficients": difference(theirs, ours)}
    if step.gated_ratio is not None:
        found["gated_ratio"] = difference(step.gated_ratio.double(), out.gated_ratio.double())
    at = found["coefficients"].at
    check = Check(
        PART,
        f"objective {objective.name}",
        f"optimiser step {step.index} ({len(step.tokens)} tokens)",
        found,
        tolerance,
        None if at is None else step.where(at),
    )
    if found["coefficients"].within(tolerance):
        return PeerComparison(check, [], None)
    apart = (theirs - ours).abs()
    places = apart.argsort(descending=True)[:WORST].tolist()
    worst = [
        Offender(
            step.where(place),
            float(step.tokens.log_ratio[place]),
            float(step.tokens.advantages[place]),
            float(theirs[place]),
            float(ours[place]),
        )
        for place in places
        if float(apart[place]) > 0
    ]
    return PeerComparison(check, worst, _hint(theirs, ours, tolerance))


def _hint(theirs: torch.Tensor, ours: torch.Tensor, tolerance: float) -> str | None:
    """Name the factor by which all coefficients differ, if one does."""
    size = float(ours @ ours)
    factor = float(theirs @ ours) / size if size else 0.0
    largest = float(theirs.abs().max())
    if not factor or float((theirs - factor * ours).abs().max()) > tolerance * largest:
        return None
    if abs(factor + 1) < tolerance:
        return "they are ours times -1: they are those of a loss that is minimised; write dJ/d log pi, J maximised"
    return (
        f'they are ours times {factor:.6g}: the token weights have another sum; write `weights`, or correct "weighting"'
    )
