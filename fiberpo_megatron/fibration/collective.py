"""Add up named float64 tables over ranks: they travel as one flat tensor through a `reduce` that the caller passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Reduce = Callable[[Tensor], "Tensor | None"]
"""Sums a flat float64 tensor over ranks, in place or by returning the result."""


def fused_sum(tables: Mapping[str, Tensor], reduce: Reduce | None) -> dict[str, Tensor]:
    """Return all tables summed over ranks in exactly one call of `reduce`; shapes are kept.

    Every rank must hold the same tables in the same shapes and order, at least one of them in float64; counts may be
    integers.
    """
    if reduce is None:
        return dict(tables)
    flat = torch.cat([table.reshape(-1) for table in tables.values()])
    result = reduce(flat)
    flat = flat if result is None else result
    summed: dict[str, Tensor] = {}
    start = 0
    for name, table in tables.items():
        size = math.prod(table.shape)
        summed[name] = flat[start : start + size].reshape(table.shape)
        start += size
    return summed
