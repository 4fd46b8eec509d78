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
    locally    int64 limbs take 2^23 terms of 2^40 before `Limbs` normalises them. Terms are first added up over runs
               of tokens, in slices of few enough bits that a run's sum is an int64 (`slices`, `Prefixes`).

The last rounding adds L_k 2^(top - 40 k) from the top, in normalised form: within two units in the last place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fiberpo_megatron.fibration.runs import RunSlice
from fiberpo_megatron.fibration.slices import largest_of, magic, magic_integer, slice_bits, slices

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

    @property
    def shared_unit(self) -> int:
        """Return the exponent of the unit to which a term is rounded before it is multiplied by a share."""
        return self.unit - SHARE_UNIT

    @property
    def limit(self) -> float:
        """Return what a sum must stay below."""
        return 2.0 ** (self.top + HEADROOM)


COUNT = Range.covering(1.0, SHARE_UNIT)
"""The range of sums of expert shares, and of counts."""
WEIGHT = Range.covering(1.0)
"""The range of sums of mu."""
LARGEST_ADVANTAGE = 1e3


class Limbs:
    """Holds sums as limbs: for each range a row of int64 tables of one shape."""

    def __init__(self, ranges: Sequence[Range], shape: Sequence[int], device: torch.device) -> None:
        self.ranges = tuple(ranges)
        rows = sum(it.limbs for it in ranges)
        self.table = torch.zeros((rows, *shape), dtype=torch.int64, device=device)
        self.overflow = torch.zeros(1, dtype=torch.float64, device=device)
        self._pending: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ranges]
        self._prefixes: list[list[Prefixes]] = [[] for _ in ranges]
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
        self._wait_for(values)

    def add_runs(self, row: int, index: Tensor, values: Tensor, runs: RunSlice) -> None:
        """Add the sums of values [n], float32 or float64, over runs to the entries `index` [r] of a row of [., 1].

        It notes values beyond the range.
        """
        it = self.ranges[row]
        parts = slices(values, it.unit, it.limit, slice_bits(runs.longest))
        if parts is None:
            self.flag()
            return
        for part, unit in parts:
            up_to_end = part.view(torch.int64).cumsum(0).index_select(0, runs.last).unsqueeze(1)
            self.add_prefixes(row, Prefixes(index, up_to_end, runs.lengths, magic_integer(unit), unit))

    def add_prefixes(self, row: int, prefixes: Prefixes) -> None:
        """Add what the runs of a chunk add up to."""
        self._prefixes[row].append(prefixes)
        self._wait_for(prefixes.up_to_end)

    def _wait_for(self, values: Tensor) -> None:
        self._waiting += values.numel()
        if self._waiting > MOST_WAITING:
            self._work_off()

    def _work_off(self) -> None:
        for row, (pending, prefixes) in enumerate(zip(self._pending, self._prefixes, strict=True)):
            finest = -math.inf if pending else min((it.unit for it in prefixes), default=-math.inf)
            if prefixes:
                pending.append(_sums_of_runs(prefixes))
                prefixes.clear()
            if pending:
                index, values = (
                    torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pending, strict=True)
                )
                self._add(row, index, values, finest)
                pending.clear()
        self._waiting = 0

    def _add(self, row: int, index: Tensor, values: Tensor, finest: float = -math.inf) -> None:
        """Add values, rounded to the last limb; limbs are left out below 2^`finest`, of which all are multiples."""
        largest = largest_of(values)
        if not largest < self.ranges[row].limit:
            self.flag()
            return
        self._adds += values.shape[0]
        if self._adds > MOST_ADDS:
            normalise(self.table, self.ranges)
            self._adds = values.shape[0]
        if values.dim() > 1:  # a table of one dimension takes a small part of the time
            columns = values.shape[1]
            index = (index.unsqueeze(1) * columns + torch.arange(columns, device=index.device)).view(-1)
            values = values.reshape(-1)
        units = self.ranges[row].units
        for limb, unit in zip(self.rows(row), units, strict=True):
            if largest < 2.0 ** (unit - 1):
                continue
            part = values + magic(unit)
            limb.view(-1).index_add_(0, index, part.view(torch.int64) - magic_integer(unit))
            if unit == units[-1] or unit <= finest:
                return
            values = values - part.sub_(magic(unit))

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


class Prefixes(NamedTuple):
    """Holds sums of a chunk's integers from its first token on, from which follows what each run adds up to.

    Sums of int64 wrap around on the way. What a run adds up to must not, nor leave int64.
    """

    entry: Tensor
    """Entry of each run in the table, int64 [r]."""
    up_to_end: Tensor
    """Sum up to the end of each run, int64 [r, C]."""
    lengths: Tensor
    """Tokens of each run, int64 [r]."""
    excess: int
    """What each token's integer is above the token's number of units."""
    unit: int
    """Exponent of the unit."""


def _sums_of_runs(prefixes: Sequence[Prefixes]) -> tuple[Tensor, Tensor]:
    """Return entries [2 R] and float64 values [2 R, C] of what R runs add up to: two each, because one has 53 bits."""
    entry, lengths = torch.cat([it.entry for it in prefixes]), torch.cat([it.lengths for it in prefixes])
    up_to_end = torch.cat([it.up_to_end for it in prefixes])
    sizes = [it.entry.shape[0] for it in prefixes]
    which = torch.arange(len(prefixes), device=entry.device).repeat_interleave(entry.new_tensor(sizes))
    before = up_to_end.roll(1, 0).index_fill_(0, entry.new_tensor([0, *itertools.accumulate(sizes[:-1])]), 0)
    excess = lengths * entry.new_tensor([it.excess for it in prefixes])[which]
    units = (up_to_end - before).sub_(excess.unsqueeze(1))
    low = units & 0xFFFFFFFF
    scale = torch.tensor([2.0**it.unit for it in prefixes], dtype=torch.float64, device=entry.device)[which]
    return entry.repeat(2), torch.cat([units.sub_(low), low]).double().mul_(scale.repeat(2).unsqueeze(1))


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
            table[limb - 1].add_(table[limb] >> WIDTH)
            table[limb].bitwise_and_(MASK)
        first += it.limbs


def decode(sent: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Return the sums, float64 [ranges, ...], from the sent limbs that were summed over ranks."""
    table = sent.long()
    normalise(table, ranges)
    found = sent.new_empty((len(ranges), *sent.shape[1:]))
    first = 0
    for total, it in zip(found, ranges, strict=True):
        total.zero_()
        for limb, unit in zip(table[first : first + it.limbs], it.units, strict=True):
            total.add_(limb.double(), alpha=2.0**unit)
        first += it.limbs
    return found


def sum_by_index(values: Tensor, index: Tensor, size: int, ranges: Sequence[Range]) -> Tensor:
    """Return the sums of float64 values [C, n] by index [n]: [C, size], for any order of the n; a range per row."""
    if len(set(ranges)) == 1:  # one sum of pairs, triples, ... costs as much as one of numbers
        limbs = Limbs(ranges[:1], (size, len(ranges)), values.device)
        limbs.add(0, index, values.t())
        return decode(limbs.to_send(), ranges[:1])[0].t()
    limbs = Limbs(ranges, (size,), values.device)
    for row, value in enumerate(values):
        limbs.add(row, index, value)
    return decode(limbs.to_send(), ranges)


def _wrapped(number: int) -> int:
    """Return the int64 that a number is up to multiples of 2^64, as sums of int64 are."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


class Totals:
    """Holds scalar sums, as one Python integer each."""

    def __init__(self, ranges: Sequence[Range], device: torch.device) -> None:
        self.ranges, self.device = tuple(ranges), device
        self.numbers = [0] * len(self.ranges)
        self.overflows = False

    def add(self, row: int, values: Tensor) -> None:
        """Add values [n], float32 or float64."""
        it, terms = self.ranges[row], values.numel()
        parts = slices(values, it.unit, it.limit, slice_bits(terms))
        if parts is None:
            self.overflows = True
            return
        for part, unit in parts:
            units = int(part.view(torch.int64).sum()) - terms * magic_integer(unit)
            self.numbers[row] += _wrapped(units) << (unit - it.unit)

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
