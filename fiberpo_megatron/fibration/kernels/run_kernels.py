"""These kernels work on ids and runs: they find where runs begin, which node each belongs to, and the sums of a node's
runs."""

from __future__ import annotations

import triton
import triton.language as tl

from fiberpo_megatron.fibration.kernels.exact_sums import MASK, WIDTH


@triton.jit
def _changes(ids, at, held, BASE: tl.constexpr):
    """Return which tokens' ids differ from the token before, and whether some base ids (the first BASE keys) are
    lower."""
    inner = held & (at > 0)
    changed = at < 0
    lower = at < 0
    tied = at >= 0
    for i in tl.static_range(len(ids)):
        here = tl.load(ids[i] + at, mask=held, other=0)
        before = tl.load(ids[i] + at - 1, mask=inner, other=0)
        changed = changed | (here != before)
        if i < BASE:
            lower = lower | (tied & (here < before))
            tied = tied & (here == before)
    return changed & inner, lower & inner


@triton.jit(do_not_specialize=["size"])
def find_cuts(ids, count_ptr, found_ptr, size, BASE: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr):
    """Write count[block], the runs that begin in the block: where an id changes, and at every CUT-th token.

    found (int64, zeros before): number of runs; 1 where base ids are not in ascending order; then per key the largest
    id, and the largest negated one.
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    held = at < size
    changed, lower = _changes(ids, at, held, BASE)
    runs = tl.sum((held & (changed | (at % CUT == 0))).to(tl.int64), axis=0)
    tl.store(count_ptr + block, runs)
    tl.atomic_add(found_ptr, runs)
    tl.atomic_max(found_ptr + 1, tl.max(lower.to(tl.int64), axis=0))
    for i in tl.static_range(len(ids)):
        value = tl.load(ids[i] + at, mask=held, other=0).to(tl.int64)
        tl.atomic_max(found_ptr + 2 + 2 * i, tl.max(value, axis=0))
        tl.atomic_max(found_ptr + 3 + 2 * i, tl.max(-value, axis=0))


@triton.jit(do_not_specialize=["size", "runs"])
def write_runs(
    ids,
    sizes,
    count_ptr,
    start_ptr,
    id_ptr,
    size,
    runs,
    BASE: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write start [runs + 1], the last one `size`, and id [keys + 1, runs], whose last row is the base node.

    count is what `find_cuts` found with the same blocks.
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    held = at < size
    changed, _ = _changes(ids, at, held, BASE)
    begins = held & (changed | (at % CUT == 0))
    run = tl.cumsum(begins.to(tl.int64), axis=0) - 1
    for first in range(0, block, BLOCK):
        before = first + tl.arange(0, BLOCK)
        run += tl.sum(tl.load(count_ptr + before, mask=before < block, other=0), axis=0)
    tl.store(start_ptr + run, at, mask=begins)
    tl.store(start_ptr + runs + at * 0, size + at * 0, mask=at == 0)
    base = at * 0
    for i in tl.static_range(len(ids)):
        value = tl.load(ids[i] + at, mask=begins, other=0).to(tl.int64)
        tl.store(id_ptr + i * runs + run, value, mask=begins)
        if i < BASE:
            base = base * sizes[i] + value
    tl.store(id_ptr + len(ids) * runs + run, base, mask=begins)


@triton.jit
def _first_at_least(sorted_ptr, value, size):
    low = size * 0
    high = size
    while low < high:
        middle = (low + high) // 2
        below = tl.load(sorted_ptr + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _runs_of(base_ptr, order_ptr, first, end, RUNS: tl.constexpr, ORDERED: tl.constexpr):
    """Return some runs of a node, `first` and later, and which of them exist."""
    at = first + tl.arange(0, RUNS)
    inside = at < end
    run = at.to(tl.int64)
    if not ORDERED:
        run = tl.load(order_ptr + at, mask=inside, other=0)
    return run, inside


@triton.jit(do_not_specialize=["runs", "nodes"])
def sum_runs(
    sums_ptr,
    base_ptr,
    order_ptr,
    table_ptr,
    runs,
    nodes,
    ROWS: tl.constexpr,
    LIMBS: tl.constexpr,
    FIRST: tl.constexpr,
    ORDERED: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Write table[l, n, p], float64: the limbs [runs, limbs, P] of node n's runs added up, in the form that
    `exact.normalise` gives.

    base is the base node of each run in ascending order, order (unless ORDERED) the runs in that order. A program adds
    one row's limbs.
    """
    node = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PADDED)
    begin = _first_at_least(base_ptr, node, runs)
    end = _first_at_least(base_ptr, node + 1, runs)
    for row in tl.static_range(ROWS):
        if tl.program_id(1) == row:
            _sum_limbs(
                sums_ptr + FIRST[row] * P + p,
                FIRST[ROWS] * P,
                base_ptr,
                order_ptr,
                table_ptr + (FIRST[row] * nodes + node) * P + p,
                nodes * P,
                begin,
                end,
                p < P,
                LIMBS[row],
                ORDERED,
                P,
                PADDED,
                RUNS,
            )


@triton.jit
def _sum_limbs(
    sums_ptr,
    run_stride,
    base_ptr,
    order_ptr,
    table_ptr,
    limb_stride,
    begin,
    end,
    entries,
    COUNT: tl.constexpr,
    ORDERED: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Add the COUNT limbs of one row over runs begin..end, and store them in normalised form; pointers are [PADDED]."""
    carry = tl.zeros((PADDED,), tl.int64)
    for step in tl.static_range(COUNT):
        total = carry
        for first in range(begin, end, RUNS):
            run, inside = _runs_of(base_ptr, order_ptr, first, end, RUNS, ORDERED)
            held = inside[:, None] & entries[None, :]
            place = sums_ptr[None, :] + run[:, None] * run_stride + (COUNT - 1 - step) * P
            total += tl.sum(tl.load(place, mask=held, other=0), axis=0)
        carry = total >> WIDTH
        if step < COUNT - 1:
            total = total & MASK
        tl.store(table_ptr + (COUNT - 1 - step) * limb_stride, total.to(tl.float64), mask=entries)


@triton.jit(do_not_specialize=["runs", "nodes"])
def report_parents(
    id_ptr,
    base_ptr,
    order_ptr,
    table_ptr,
    runs,
    nodes,
    FIRST: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED_KEYS: tl.constexpr,
    ORDERED: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Write `tree.parent_tables`: per base node the reports, and per coarser key the sum and sum of squares of reported
    ids.

    Rows FIRST to FIRST + KEYS of id [..., runs] are the keys that only coarser levels name.
    """
    node = tl.program_id(0).to(tl.int64)
    begin = _first_at_least(base_ptr, node, runs)
    end = _first_at_least(base_ptr, node + 1, runs)
    origin, present = _runs_of(base_ptr, order_ptr, begin, end, 1, ORDERED)
    reports = tl.sum(present.to(tl.float64), axis=0)
    k = tl.arange(0, PADDED_KEYS)
    row = id_ptr + (FIRST + k) * runs
    seen = tl.load(row + tl.sum(tl.where(present, origin, 0), axis=0), mask=(k < KEYS) & (begin < end), other=0)
    total = seen.to(tl.float64)
    squares = total * total
    for first in range(begin, end, RUNS):
        run, inside = _runs_of(base_ptr, order_ptr, first, end, RUNS, ORDERED)
        held = inside[:, None] & (k < KEYS)[None, :]
        value = tl.load(row[None, :] + run[:, None], mask=held, other=0)
        wrong = tl.max((held & (value != seen[None, :])).to(tl.int32), axis=1) > 0
        reports += tl.sum(wrong.to(tl.float64), axis=0)
        odd = tl.where(wrong[:, None], value, 0).to(tl.float64)
        total += tl.sum(odd, axis=0)
        squares += tl.sum(odd * odd, axis=0)
    tl.store(table_ptr + node, reports)
    tl.store(table_ptr + (1 + 2 * k) * nodes + node, total, mask=k < KEYS)
    tl.store(table_ptr + (2 + 2 * k) * nodes + node, squares, mask=k < KEYS)
