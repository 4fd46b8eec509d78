"""Cut numbers into slices: multiples of a unit with so few bits that sums of many of them are exact."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fiberpo_megatron.fibration.runs import CPU_CHUNK, GPU_CHUNK

MOST_SLICE_BITS = 50
"""Bits of a slice with its sign: `magic` leaves room for 51."""


def slice_bits(terms: int) -> int:
    """Return how many bits a slice may have, so that the sum of so many of its integers fits int64."""
    return min(MOST_SLICE_BITS, 63 - terms.bit_length())


def float_slice_bits(like: Tensor) -> int:
    """Return how many bits the slices of a chunk's terms may have, so that any of them add up exactly in float64."""
    return 52 - (CPU_CHUNK if like.device.type == "cpu" else GPU_CHUNK).bit_length() + 1


def magic(unit: int) -> float:
    """Return the number whose sum with a value below 2^(51 + unit) has units of 2^unit; ties go to even.

    No flag of a compiler may reorder the sum and what follows; torch and Triton do not.
    """
    return 1.5 * 2.0 ** (52 + unit)


def magic_integer(unit: int) -> int:
    """Return `magic` as the int64 that has its bits. Those of a sum with a value are larger by the value's units."""
    return (1023 + 52 + unit) << 52 | 1 << 51


def rounded(values: Tensor, unit: int) -> Tensor:
    """Return float64 values, all below 2^(51 + unit), rounded to multiples of 2^unit."""
    return (values + magic(unit)).sub_(magic(unit))


def slices(values: Tensor, unit: int, limit: float, bits: int) -> Iterator[tuple[Tensor, int]] | None:
    """Cut terms into slices that add up to the terms, rounded to multiples of 2^unit.

    Each slice comes with its unit's exponent and holds multiples of it, of at most 2^bits units. It is a float64 tensor
    of its own that has `magic` of that unit still in it, and it is used up when the next one is asked for. The cut
    depends on the values at hand, the sum does not. Returns None if a value is not below `limit`.
    """
    largest, finest = _reach(values)
    return _slices(values, unit, largest, finest, bits) if largest < limit else None


def _slices(values: Tensor, unit: int, largest: float, finest: float, bits: int) -> Iterator[tuple[Tensor, int]]:
    while largest > 0.0:
        here = max(math.frexp(largest)[1] - bits, unit)
        part = values.to(torch.float64, copy=True).add_(magic(here))
        yield part, here
        if here == unit or here <= finest:
            return
        values = values - part.sub_(magic(here))
        largest, finest = _reach(values)


def _reach(values: Tensor) -> tuple[float, float]:
    """Return the largest magnitude (not a number if one of the values is), and an exponent e such that all values are
    multiples of 2^e."""
    if values.dtype != torch.float32 or values.numel() == 0:
        return largest_of(values), -math.inf
    # A look at the smallest magnitude is cheaper than a slice, and magnitudes in float32 compare as integers do.
    bits = values.view(torch.int32) & 0x7FFFFFFF
    smallest, largest = (int(end) for end in torch.aminmax(bits))
    if smallest == 0:  # zeros wrap around to the largest integer
        smallest = int(bits.add_(0x7FFFFFFF).amin()) + (1 << 31) + 1
    return struct.unpack("<f", struct.pack("<I", largest))[0], max(smallest >> 23, 1) - 127 - 23


def largest_of(values: Tensor) -> float:
    """Return the largest magnitude, 0 without values; not a number if one of the values is."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    return max(-float(low), float(high)) if low == low else math.nan


class Cut(NamedTuple):
    """Says how values [n] are cut into slices that add up to them."""

    values: Tensor
    units: tuple[int, ...]
    """Exponent of each slice's unit, largest first."""
    exact: bool
    """Whether all values are multiples of the last unit; if not, they are rounded to it."""

    def write(self, out: Tensor) -> None:
        """Write the slices, float64 [len(units), n]."""
        for at, (unit, own) in enumerate(zip(self.units, out, strict=True)):
            own.copy_(self.values)
            for before in out[:at]:
                own.sub_(before)
            if at + 1 < len(self.units) or not self.exact:
                own.add_(magic(unit)).sub_(magic(unit))


def cut(values: Tensor, unit: int, limit: float, bits: int) -> Cut | None:
    """Return slices of at most 2^`bits` units that add up to values [n], rounded to multiples of 2^unit.

    The slices depend on the values at hand, their sum does not. Returns None if a value is not below `limit`.
    """
    largest, finest = _reach(values)
    if not largest < limit:
        return None
    units: list[int] = []
    here = math.frexp(largest)[1]
    while largest > 0.0 and (not units or here > max(unit, finest)):
        here = max(here - bits, unit)
        units.append(here)
    return Cut(values, tuple(units), here <= finest)
