"""This module compares two results: their bits, or how far they are apart and where."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Difference:
    """Describes how one tensor differs from another of the same shape."""

    differing: int
    """Number of entries whose bits differ."""
    largest: float
    """Largest absolute difference; inf where one of the two is not finite and the other is another number."""
    relative: float
    """That over the largest finite entry of the tensor that is compared with."""
    at: int | None
    """Place of the largest difference; None when all bits are equal."""

    @property
    def equal(self) -> bool:
        """Return whether all bits are equal."""
        return self.differing == 0

    def within(self, tolerance: float | None) -> bool:
        """Return whether the bits are equal (a tolerance of None), or the relative difference is small enough."""
        return self.equal if tolerance is None else self.relative <= tolerance

    def __str__(self) -> str:
        if self.equal:
            return "equal bits"
        return f"{self.differing} differ, by at most {self.largest:.2g} ({self.relative:.2g} of the largest)"


def difference(found: Tensor, wanted: Tensor) -> Difference:
    """Compare [n] floating-point numbers of one dtype on any devices.

    Raises ValueError when shapes or dtypes differ.
    """
    found, wanted = found.detach().cpu(), wanted.detach().cpu()
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise ValueError(
            f"{found.dtype} {list(found.shape)} cannot be compared with {wanted.dtype} {list(wanted.shape)}; compare "
            "results of the same tokens"
        )
    bits = _BITS[wanted.dtype]
    differ = found.contiguous().view(bits) != wanted.contiguous().view(bits)
    count = int(differ.sum())
    if not count:
        return Difference(0, 0.0, 0.0, None)
    apart = (found.double() - wanted.double()).abs().nan_to_num(nan=float("inf")).masked_fill(~differ, 0.0)
    at = int(apart.argmax()) if float(apart.max()) else int(differ.nonzero()[0])
    largest = float(apart[at])
    finite = wanted[wanted.isfinite()].double()
    size = float(finite.abs().max()) if len(finite) else 0.0
    return Difference(count, largest, largest / size if size else (float("inf") if largest else 0.0), at)


def metric_difference(found: Mapping[str, float], wanted: Mapping[str, float]) -> tuple[Difference, str | None]:
    """Compare metrics by name, each relative to its own size; return the worst and its name.

    Raises ValueError when the names differ.
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"metrics have other names: {sorted(found.keys() ^ wanted.keys())}")
    worst, name, differing = Difference(0, 0.0, 0.0, None), None, 0
    for key, value in wanted.items():
        one = difference(torch.tensor([found[key]], dtype=torch.float64), torch.tensor([value], dtype=torch.float64))
        differing += one.differing
        if one.differing and (name is None or one.relative > worst.relative):
            worst, name = one, key
    return Difference(differing, worst.largest, worst.relative, worst.at), name
