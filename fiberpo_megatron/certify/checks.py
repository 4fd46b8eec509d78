"""This module holds what a certificate says about one comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fiberpo_megatron.certify.compare import Difference, difference, metric_difference
from fiberpo_megatron.fibration import ObjectiveOutput


@dataclass(frozen=True)
class Result:
    """Holds what an objective gave for all tokens of a batch, in the order of the batch."""

    gradient: Tensor
    gated_ratio: Tensor
    metrics: dict[str, float] | None = None

    @classmethod
    def of(cls, out: ObjectiveOutput) -> "Result":
        """Return the result of one call about all tokens."""
        return cls(out.gradient, out.gated_ratio, None if out.metrics is None else out.metrics.as_dict())


@dataclass(frozen=True)
class Check:
    """Describes one comparison: what was demanded and what was found."""

    part: str
    """What was compared: a heading of the page."""
    what: str
    """How the two sides differ, for example "4 data-parallel ranks"."""
    subject: str
    """On what it was tried: a batch, or a model."""
    found: Mapping[str, Difference]
    """By result, for example "gradient"."""
    tolerance: float | None = None
    """Largest relative difference that passes; None demands equal bits."""
    where: str | None = None
    """Where the largest difference is; None when all bits are equal."""

    @property
    def passed(self) -> bool:
        """Return whether every result is within the tolerance."""
        return all(one.within(self.tolerance) for one in self.found.values())


def check_results(
    part: str,
    what: str,
    subject: str,
    found: Result,
    wanted: Result,
    tolerance: float | None = None,
) -> Check:
    """Compare two results; metrics only where both have some."""
    differences = {
        "gradient": difference(found.gradient, wanted.gradient),
        "gated_ratio": difference(found.gated_ratio, wanted.gated_ratio),
    }
    where = next((f"{name} of token {one.at}" for name, one in differences.items() if not one.equal), None)
    if found.metrics is not None and wanted.metrics is not None:
        differences["metrics"], name = metric_difference(found.metrics, wanted.metrics)
        where = where or (None if name is None else f"metric {name}")
    return Check(part, what, subject, differences, tolerance, where)
