"""Add up numbers so that the result has the same bits in any order, cut over any ranks, chunks and micro-batches.

A float64 sum depends on the order of its terms. Here each term is rounded once, on its own, to a multiple of a fixed
unit; everything after that is integer arithmetic, which is exact, and one last rounding makes a float64 of the sum.

An integer of a sum takes more than 64 bits. It is kept in limbs: int64 numbers L_0, L_1, ... that stand for
sum_k L_k 2^(top - 40 k). `Range` gives the top exponent and the number of limbs:

    capacity   |sum| < 2^51 units of limb 0: |term| <= `largest` for 1e8 terms. Beyond it, or for a term that is not
               finite, a flag travels with the sums, and every rank raises (`Limbs.overflow`).
    error      half the unit of the last limb per term, at most 2^-121. The node terms of FiberPO are mu, mu |x| and
               mu |A| G. Take the smallest weight, mu = 1e-9 > 2^-30. An error below 1e-11 > 2^-36.6 of the sum of
               absolute terms then holds for a mean |x| or |A| G from 2^-121 / 2^-30 / 2^-36.6 = 2^-54 on. With expert
               shares, mu x is rounded to the unit times 2^48 and a share to 2^-48, so that their product needs no
               rounding: the bound then holds for a mean |x| (last unit 2^-138) from 2^-24 and for a mean |A| G (last
               unit 2^-145) from 2^-31 on, and for shares from 2^-12 on. float32 terms are rarer still rounded: one
               above 2^24 units is exact.
    across     before they cross ranks, limbs are normalised to 0 <= L_k < 2^40 for k > 0, so that the sums over up to
    ranks      8,192 ranks are integers below 2^53, which float64 carries exactly.
    locally    int64 limbs take 2^23 terms of 2^40 before `Limbs` normalises them.

The last rounding adds L_k 2^(top - 40 k) from the top, in normalised form: within two units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.runs import CPU_CHUNK, GPU_CHUNK

WIDTH = 40
"""Bits of a limb."""
MASK = (1 << WIDTH) - 1
HEADROOM = 51
"""A sum of `Range.largest` terms stays below 2^HEADROOM units of the top limb."""
MOST_TERMS = 1e8
FINEST = -120
"""Exponent that the unit of the last limb does not exceed."""
SHARE_UNIT = -48
"""Exponent of the unit to which expert shares are rounded: a share is at most 1, so that a multiple has 49 bits."""
MOST_WAITING = 1 << 20
"""Values that `Limbs` puts aside at most before it adds them up."""
MOST_ADDS = 1 << 22
"""Additions to one entry of a table before its limbs are normalised."""


@dataclass(frozen=True)
class Range:
    """Holds where the limbs of a kind of term lie."""

    top: int
    """Exponent of the unit of limb 0."""
    limbs: int

    @classmethod
    def covering(cls, largest: float, finest: int = FINEST) -> Range:
        """Return the range for sums of up to 1e8 terms of magnitudes up to `largest`, down to units of 2^finest."""
        top = math.ceil(math.log2(largest) + math.log2(MOST_TERMS)) - HEADROOM
        return cls(top, 1 + max(0, -((finest - top) // WIDTH)))

    @property
    def units(self) -> tuple[int, ...]:
        """Return the exponent of each limb's unit."""
        return tuple(self.top - WIDTH * limb for limb in range(self.limbs))

    @property
    def unit(self) -> int:
        """Return the exponent of the unit to which terms are rounded."""
        return self.units[-1]

    def term_unit(self, *, shared: bool) -> int:
        """Return the exponent of the unit to which a term is rounded before it is multiplied by a share, if it is."""
        return self.unit - SHARE_UNIT if shared else self.unit

    @property
    def limit(self) -> float:
        """Return what a sum must stay below."""
        return 2.0 ** (self.top + HEADROOM)


COUNT = Range.covering(1.0, SHARE_UNIT)
"""The range of sums of expert shares, and of counts."""
WEIGHT = Range.covering(1.0)
"""The range of sums of mu."""
LARGEST_ADVANTAGE = 1e3


def slice_bits(like: Tensor) -> int:
    """Return how many bits the slices of a chunk's terms may have, so that any of them add up exactly in float64."""
    return 52 - (CPU_CHUNK if like.device.type == "cpu" else GPU_CHUNK).bit_length() + 1


def rounded(values: Tensor, unit: int) -> Tensor:
    """Return float64 values, all below 2^(51 + unit), rounded to multiples of 2^unit; ties go to even.

    The sum with 1.5 * 2^(52 + unit) has units of 2^unit. No flag of a compiler may reorder the two operations; torch
    and Triton do not.
    """
    magic = 1.5 * 2.0 ** (52 + unit)
    return (values + magic).sub_(magic)


def slices(values: Tensor, unit: int, limit: float, bits: int) -> Iterator[tuple[Tensor, int]] | None:
    """Cut float64 terms into slices that add up to the terms, rounded to multiples of 2^unit.

    Each slice comes with its unit's exponent and holds multiples of it, of at most 2^bits units. The cut depends on the
    values at hand, the sum does not. Returns None if a value is not below `limit`. `values` are used up.
    """
    largest = _largest(values)
    return _slices(values, unit, largest, bits) if largest < limit else None


def _slices(values: Tensor, unit: int, largest: float, bits: int) -> Iterator[tuple[Tensor, int]]:
    while largest > 0.0:
        here = max(math.frexp(largest)[1] - bits, unit)
        part = rounded(values, here)
        yield part, here
        if here == unit:
            return
        values = values.sub_(part)
        largest = _largest(values)


def _largest(values: Tensor) -> float:
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    return max(-float(low), float(high)) if low == low else math.nan


class Limbs:
    """Holds sums as limbs: for each range a row of int64 tables of one shape."""

    def __init__(self, ranges: Sequence[Range], shape: Sequence[int], device: torch.device) -> None:
        self.ranges = tuple(ranges)
        rows = sum(it.limbs for it in ranges)
        self.table = torch.zeros((rows, *shape), dtype=torch.int64, device=device)
        self.overflow = torch.zeros(1, dtype=torch.float64, device=device)
        self._pending: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ranges]
        self._waiting = 0
        self._adds = 0

    def rows(self, row: int) -> Tensor:
        """Return the limbs of one range, [limbs, ...]."""
        first = sum(it.limbs for it in self.ranges[:row])
        return self.table[first : first + self.ranges[row].limbs]

    def flag(self) -> None:
        """Note that a term or sum is beyond the range."""
        self.overflow.fill_(1.0)

    def add(self, row: int, index: Tensor, values: Tensor) -> None:
        """Add float64 values [r, ...] to the entries `index` [r] of a row.

        Values are rounded to the unit of the range's last limb; those that are multiples of it are added exactly. They
        are put aside first, because cutting few values takes as long as cutting many.
        """
        self._pending[row].append((index, values))
        self._waiting += values.numel()
        if self._waiting > MOST_WAITING:
            self._work_off()

    def _work_off(self) -> None:
        for row, pending in enumerate(self._pending):
            if pending:
                index, values = (
                    torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pending, strict=True)
                )
                self._add(row, index, values)
                pending.clear()
        self._waiting = 0

    def _add(self, row: int, index: Tensor, values: Tensor) -> None:
        if not _largest(values) < self.ranges[row].limit:
            self.flag()
            return
        self._adds += values.shape[0]
        if self._adds > MOST_ADDS:
            normalise(self.table, self.ranges)
            self._adds = values.shape[0]
        units = self.ranges[row].units
        for limb, unit in zip(self.rows(row), units, strict=True):
            part = rounded(values, unit)
            if unit != units[-1]:
                values = values - part
            limb.index_add_(0, index, part.mul_(2.0**-unit).long())

    def to_send(self) -> Tensor:
        """Return the limbs in normalised form, float64 [rows, ...]: sums over up to 8,192 ranks are exact."""
        self._work_off()
        normalise(self.table, self.ranges)
        for row in range(len(self.ranges)):
            top = self.rows(row)[0]
            self.overflow += (top.abs() >= 1 << HEADROOM).any()
        return self.table.double()

    def decode(self, sent: Tensor) -> Tensor:
        """Return the sums, float64 [ranges, ...], from what `to_send` of all ranks adds up to; infinite beyond the
        range."""
        found = decode(sent, self.ranges)
        for row, it in zip(found, self.ranges, strict=True):
            row.masked_fill_(row.abs() >= it.limit, math.inf)
        return found


class FloatSums:
    """Holds sums in float64, as `Limbs` holds them exactly: their last bits depend on the order of the terms."""

    def __init__(self, rows: int, shape: Sequence[int], device: torch.device) -> None:
        self.table = torch.zeros((rows, *shape), dtype=torch.float64, device=device)
        self.overflow = torch.zeros(1, dtype=torch.float64, device=device)

    def to_send(self) -> Tensor:
        """Return the sums, float64 [rows, ...]."""
        self.overflow += (~torch.isfinite(self.table)).any()
        return self.table

    def decode(self, sent: Tensor) -> Tensor:
        """Return the sums over ranks."""
        return sent


NodeSums = Limbs | FloatSums


def normalise(table: Tensor, ranges: Sequence[Range]) -> None:
    """Carry in place, so that all limbs but the top one are in 0..2^40 - 1: the form that a number has only once."""
    first = 0
    for it in ranges:
        for limb in range(first + it.limbs - 1, first, -1):
            table[limb - 1] += table[limb] >> WIDTH
            table[limb] &= MASK
        first += it.limbs


def decode(sent: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Return the sums, float64 [ranges, ...], from the sent limbs that were summed over ranks."""
    table = sent.long()
    normalise(table, ranges)
    found = sent.new_empty((len(ranges), *sent.shape[1:]))
    first = 0
    for row, it in enumerate(ranges):
        total = found[row].zero_()
        for limb, unit in enumerate(it.units):
            total += table[first + limb].double().mul_(2.0**unit)
        first += it.limbs
    return found


def sum_by_index(values: Tensor, index: Tensor, size: int, ranges: Sequence[Range]) -> Tensor:
    """Return the sums of float64 values [C, n] by index [n]: [C, size], for any order of the n; a range per row."""
    limbs = Limbs(ranges, (size,), values.device)
    for row, value in enumerate(values):
        limbs.add(row, index, value)
    return decode(limbs.to_send(), ranges)


class Totals:
    """Holds scalar sums, as one Python integer each."""

    def __init__(self, ranges: Sequence[Range], device: torch.device) -> None:
        self.ranges, self.device = tuple(ranges), device
        self.numbers = [0] * len(self.ranges)
        self.overflows = False

    def add(self, row: int, values: Tensor) -> None:
        """Add float64 values [n], of one chunk of tokens; they are used up."""
        it = self.ranges[row]
        parts = slices(values, it.unit, it.limit, slice_bits(values))
        if parts is None:
            self.overflows = True
            return
        for part, unit in parts:
            self.numbers[row] += int(float(part.sum()) * 2.0**-unit) << (unit - it.unit)

    def to_send(self) -> Tensor:
        """Return the limbs of all sums, float64 [rows]; `overflows` then says whether one is beyond its range."""
        sent: list[int] = []
        for number, it in zip(self.numbers, self.ranges, strict=True):
            limbs: list[int] = []
            for _ in range(it.limbs - 1):
                limbs.append(number & MASK)
                number >>= WIDTH
            self.overflows |= abs(number) >= 1 << HEADROOM
            sent += [number if abs(number) < 1 << HEADROOM else 0, *reversed(limbs)]
        return torch.tensor(sent, dtype=torch.float64, device=self.device)

    def values(self, row: int) -> float:
        """Return this rank's sum."""
        return math.ldexp(self.numbers[row], self.ranges[row].unit)


def decode_totals(sent: Tensor, ranges: Sequence[Range]) -> list[float]:
    """Return the sums from what `Totals.to_send` of all ranks add up to."""
    limbs = iter(sent.tolist())
    found = []
    for it in ranges:
        number = 0
        for _ in range(it.limbs):
            number = (number << WIDTH) + int(next(limbs))
        found.append(math.ldexp(number, it.unit))
    return found
