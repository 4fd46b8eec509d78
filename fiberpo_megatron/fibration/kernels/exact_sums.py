"""These device functions and kernels add up terms as `exact.py` does: in integers, so that the order does not matter.

TOPS, LIMBS and FIRST hold, for each row of sums, the exponent of its top limb's unit, the number of its limbs, and
where they begin in a table of limbs [sum of LIMBS, ...] (`layout_of`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl

from fiberpo_megatron.fibration import exact

WIDTH = tl.constexpr(exact.WIDTH)
MASK = tl.constexpr(exact.MASK)
HALF = tl.constexpr(exact.WIDTH // 2)
HALF_MASK = tl.constexpr((1 << exact.WIDTH // 2) - 1)
SHARE_UNIT = tl.constexpr(exact.SHARE_UNIT)
SHARE_PARTS = tl.constexpr(3)
"""Parts of HALF bits that a share has."""
LARGEST_TERM = tl.constexpr(32)
"""A term must be below 2^LARGEST_TERM units of the top limb: with a share of HALF bits 1,024 of them fit int64."""
LIMIT = tl.constexpr(1 << exact.HEADROOM)


def layout_of(ranges: Sequence[exact.Range]) -> dict[str, tuple[int, ...]]:
    """Return the constants that tell kernels of the limbs of some sums; a kernel without sums gets one empty row."""
    limbs = [it.limbs for it in ranges]
    first = list(itertools.accumulate(limbs, initial=0))
    return {"TOPS": tuple(it.top for it in ranges) or (0,), "LIMBS": tuple(limbs) or (0,), "FIRST": tuple(first)}


@triton.jit
def _rounded(values, UNIT: tl.constexpr):
    """Return float64 values rounded to multiples of 2^UNIT, as `slices.rounded` does.

    Triton may hold the constant, as those below, in float32: it is exact in every format.
    """
    return (values + 1.5 * 2.0 ** (52 + UNIT)) - 1.5 * 2.0 ** (52 + UNIT)


@triton.jit
def held_back(values, TOP: tl.constexpr):
    """Return float64 values with zero in place of those that are beyond the range or not finite, and which are."""
    beyond = ~(tl.abs(values) < 2.0 ** (TOP + LARGEST_TERM))
    return tl.where(beyond, 0.0, values), beyond


@triton.jit
def store_total(out_ptr, values, TOP: tl.constexpr, COUNT: tl.constexpr):
    """Store the limbs of the sum of float64 values [BLOCK], and return whether one is beyond the range."""
    rest, beyond = held_back(values, TOP)
    for limb in tl.static_range(COUNT):
        part = _rounded(rest, TOP - WIDTH * limb)
        if limb < COUNT - 1:
            rest = rest - part
        # At most 1,024 multiples of the unit, each below 2^39 units (2^32 in the top limb): float64 adds them exactly.
        tl.store(out_ptr + limb, (tl.sum(part, axis=0) * 2.0 ** (WIDTH * limb - TOP)).to(tl.int64))
    return tl.max(beyond.to(tl.int32), axis=0)


@triton.jit
def limb_of(values, LIMB: tl.constexpr, TOP: tl.constexpr):
    """Return what float64 values, below the range's limit, add to one limb: int64."""
    part = _rounded(values, TOP)
    for limb in tl.static_range(LIMB):
        values = values - part
        part = _rounded(values, TOP - WIDTH * (limb + 1))
    return (part * 2.0 ** (WIDTH * LIMB - TOP)).to(tl.int64)


@triton.jit
def share_parts(kernel):
    """Return K [BLOCK, PADDED] as SHARE_PARTS parts of HALF bits, rounded to 2^SHARE_UNIT as `NodeMap` does."""
    rest = _rounded(kernel.to(tl.float64), SHARE_UNIT)
    parts = ()
    for j in tl.static_range(SHARE_PARTS):
        part = _rounded(rest, -HALF * (j + 1))
        rest = rest - part
        parts = parts + (part * 2.0 ** (HALF * (j + 1)),)
    return parts


@triton.jit
def store_products(out_ptr, stride, values, parts, inside, TOP: tl.constexpr, COUNT: tl.constexpr):
    """Store the limbs of sum_i K(i, p) values_i per partition, limb by limb `stride` apart; return whether a value is
    beyond the range.

    Values are cut into parts of HALF bits; their products with the parts of K have units of 2^(TOP - HALF h).
    """
    rest, beyond = held_back(values, TOP)
    rest = _rounded(rest, TOP - WIDTH * (COUNT - 1) - SHARE_UNIT)
    cut = ()
    for i in tl.static_range(2 * COUNT - 3):
        part = _rounded(rest, TOP - HALF * i)
        rest = rest - part
        cut = cut + (part * 2.0 ** (HALF * i - TOP),)
    above = tl.sum(parts[0].to(tl.int64), axis=0) * 0
    for limb in tl.static_range(COUNT):
        # h = 2 limb - 1 lies half a limb above: its lower half belongs here, as the upper half of h = 2 limb + 1 does.
        total = (above & HALF_MASK) << HALF
        above = above * 0
        for j in tl.static_range(SHARE_PARTS):
            if (2 * limb - 1 - j >= 0) and (2 * limb - 1 - j < 2 * COUNT - 3):
                total += tl.sum((parts[j] * cut[2 * limb - 1 - j][:, None]).to(tl.int64), axis=0)
            if (2 * limb - j >= 0) and (2 * limb - j < 2 * COUNT - 3):
                above += tl.sum((parts[j] * cut[2 * limb - j][:, None]).to(tl.int64), axis=0)
        tl.store(out_ptr + limb * stride, total + (above >> HALF), mask=inside)
    return tl.max(beyond.to(tl.int32), axis=0)


@triton.jit
def decoded(limbs, TOP: tl.constexpr, COUNT: tl.constexpr):
    """Return the float64 sum that int64 limbs, from the top down, stand for, as `exact.decode` does."""
    normal = ()
    carry = limbs[0] * 0
    for step in tl.static_range(COUNT):
        whole = limbs[COUNT - 1 - step] + carry
        if step < COUNT - 1:
            carry = whole >> WIDTH
            whole = whole & MASK
        normal = (whole,) + normal
    total = normal[0].to(tl.float64) * 0.0
    for limb in tl.static_range(COUNT):
        total += normal[limb].to(tl.float64) * 2.0 ** (TOP - WIDTH * limb)
    return total, normal[0]


@triton.jit
def _decoded_row(limbs_ptr, stride, held, TOP: tl.constexpr, COUNT: tl.constexpr):
    limbs = ()
    for limb in tl.static_range(COUNT):
        limbs = limbs + (tl.load(limbs_ptr + limb * stride, mask=held, other=0.0).to(tl.int64),)
    return decoded(limbs, TOP, COUNT)


@triton.jit(do_not_specialize=["programs"])
def sum_programs(
    in_ptr, out_ptr, programs, ROWS: tl.constexpr, LIMBS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the limbs of a row, in the form that `exact.normalise` gives, as float64: out [sum of LIMBS] is the sum of
    in [programs, sum of LIMBS] over the programs of a pass. One program works on each row."""
    for row in tl.static_range(ROWS):
        if tl.program_id(0) == row:
            _sum_row(in_ptr + FIRST[row], FIRST[ROWS], out_ptr + FIRST[row], programs, LIMBS[row], BLOCK)


@triton.jit
def _sum_row(in_ptr, stride, out_ptr, programs, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    carry = tl.zeros((), tl.int64)
    for step in tl.static_range(COUNT):
        total = carry
        for first in range(0, programs, BLOCK):
            at = (first + tl.arange(0, BLOCK)).to(tl.int64)
            place = in_ptr + at * stride + (COUNT - 1 - step)
            total += tl.sum(tl.load(place, mask=at < programs, other=0), axis=0)
        carry = total >> WIDTH
        if step < COUNT - 1:
            total = total & MASK
        tl.store(out_ptr + (COUNT - 1 - step), total.to(tl.float64))


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["flag_ptr"])
def decode_sums(
    limbs_ptr,
    out_ptr,
    flag_ptr,
    size,
    ROWS: tl.constexpr,
    TOPS: tl.constexpr,
    LIMBS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write sums [ROWS, size], float64, from limbs [sum of LIMBS, size] that were summed over ranks; flag becomes 1 if
    one is beyond its range."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < size
    beyond = at < 0
    for row in tl.static_range(ROWS):
        total, top = _decoded_row(limbs_ptr + FIRST[row] * size + at, size, held, TOPS[row], LIMBS[row])
        beyond = beyond | (tl.abs(top) >= LIMIT)
        tl.store(out_ptr + row * size + at, total, mask=held)
    tl.atomic_max(flag_ptr, tl.max(beyond.to(tl.int32), axis=0))
