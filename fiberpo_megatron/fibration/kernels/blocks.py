"""The kernels: one program per run of at most BLOCK tokens, so that a program's tokens share their base node.

Each program writes its own float64 sums; `sum_runs` adds them per node in the order of the tokens. No float is
added atomically, so results do not depend on how programs are scheduled. Token tensors are contiguous; PADDED is
P rounded up to a power of two; without expert shares P is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fiberpo_megatron.fibration import histogram
from fiberpo_megatron.fibration.tokens import MAX_LOG_RATIO

BINS = tl.constexpr(histogram.BINS)
PADDED_BINS = tl.constexpr(1 << histogram.BINS.bit_length())
SHIFT = tl.constexpr(histogram.SHIFT)
LOWEST = tl.constexpr(histogram.LOWEST)
PER_SIGN = tl.constexpr(histogram.PER_SIGN)
CLAMP = tl.constexpr(MAX_LOG_RATIO)
FIRST_SUMS = tl.constexpr(6)
SECOND_SUMS = tl.constexpr(2)


@triton.jit
def _tokens(start_ptr, length_ptr, BLOCK: tl.constexpr):
    """This program's run, the positions of its tokens, and which of them exist."""
    run = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    return run, tl.load(start_ptr + run) + lane, lane < tl.load(length_ptr + run)


@triton.jit
def _clamped(x_ptr, at, held):
    return tl.minimum(tl.maximum(tl.load(x_ptr + at, mask=held, other=0.0), -CLAMP), CLAMP)


@triton.jit
def _share(share_ptr, at, held, like, P: tl.constexpr, PADDED: tl.constexpr, EXPERTS: tl.constexpr):
    """omega [BLOCK, PADDED]; ones without experts."""
    if EXPERTS:
        p = tl.arange(0, PADDED)
        inside = held[:, None] & (p < P)[None, :]
        share = tl.load(share_ptr + at[:, None] * P + p[None, :], mask=inside, other=0.0)
    else:
        share = tl.zeros_like(like)[:, None] + 1.0
    return share


@triton.jit
def _kernel(share, PADDED: tl.constexpr, SOFT: tl.constexpr):
    """K: omega when soft, one-hot at its first maximum when hard."""
    kernel = share
    if not SOFT:
        best = tl.argmax(share, axis=1, tie_break_left=True)
        kernel = (tl.arange(0, PADDED)[None, :] == best[:, None]).to(share.dtype)
    return kernel


@triton.jit
def _gather(table_ptr, base, nodes, kernel, ROWS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr):
    """sum_n K(i, n) table[c, n] per token, for each row c of table [ROWS, nodes, P]."""
    p = tl.arange(0, PADDED)
    values = ()
    for c in tl.static_range(ROWS):
        row = tl.load(table_ptr + (c * nodes + base) * P + p, mask=p < P, other=0.0)
        values = values + (tl.sum(kernel * row[None, :], axis=1),)
    return values


@triton.jit
def _store_sums(sums_ptr, run, terms, kernel, ROWS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr):
    """sums[run, c, p] = sum_i K(i, p) terms[c]_i, in float64."""
    p = tl.arange(0, PADDED)
    for c in tl.static_range(ROWS):
        total = tl.sum((kernel * terms[c][:, None]).to(tl.float64), axis=0)
        tl.store(sums_ptr + (run * ROWS + c) * P + p, total, mask=p < P)


@triton.jit
def _total(value):
    return tl.sum(value.to(tl.float64), axis=0)


@triton.jit
def _count_bins(bins_ptr, x, counted):
    """Adds the block to `histogram.histogram`'s counts; integers, so the order does not matter."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = ((bits & 0x7FFFFFFF) >> SHIFT) - (LOWEST - 1)
    magnitude = tl.minimum(tl.maximum(magnitude, 0), PER_SIGN)
    at = tl.where(bits < 0, PER_SIGN - magnitude, PER_SIGN + magnitude)
    counts = tl.histogram(tl.where(counted, at, PADDED_BINS - 1), PADDED_BINS)
    place = tl.arange(0, PADDED_BINS)
    tl.atomic_add(bins_ptr + place, counts, mask=(place < BINS) & (counts > 0))


@triton.jit
def first_pass(
    x_ptr,
    mu_ptr,
    share_ptr,
    start_ptr,
    length_ptr,
    sums_ptr,
    statistics_ptr,
    bins_ptr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    STATISTICS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Node sums [runs, ROWS, P] and, with STATISTICS, `TokenStatistics`' sums [runs, 6] and histogram."""
    run, at, held = _tokens(start_ptr, length_ptr, BLOCK)
    x = _clamped(x_ptr, at, held)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0)
    counted = mu > 0
    share = _share(share_ptr, at, held, x, P, PADDED, EXPERTS)
    if ROWS > 0:
        _store_sums(sums_ptr, run, TERMS(x, mu, counted), _kernel(share, PADDED, SOFT), ROWS, P, PADDED)
    if STATISTICS:
        ratio = tl.exp(x)
        weighted = ratio * mu
        out = statistics_ptr + run * FIRST_SUMS
        tl.store(out, _total(counted))
        tl.store(out + 1, _total(tl.where(counted, ratio, 0.0)))
        tl.store(out + 2, _total(mu))
        tl.store(out + 3, _total(weighted))
        tl.store(out + 4, _total(weighted * ratio))
        if EXPERTS:
            entropy = tl.sum(tl.where(share > 0, share * tl.log(tl.where(share > 0, share, 1.0)), 0.0), axis=1)
            tl.store(out + 5, -_total(mu * entropy))
        _count_bins(bins_ptr, x, counted)


@triton.jit
def second_pass(
    x_ptr,
    a_ptr,
    mu_ptr,
    share_ptr,
    start_ptr,
    length_ptr,
    base_ptr,
    values_ptr,
    ratio_ptr,
    gradient_ptr,
    sums_ptr,
    statistics_ptr,
    nodes,
    GATE: tl.constexpr,
    OPTIONS: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """G and the direct gradient [N], adjoint sums [runs, ROWS, P], and [runs, 2]: value and clipped tokens."""
    run, at, held = _tokens(start_ptr, length_ptr, BLOCK)
    x = _clamped(x_ptr, at, held)
    a = tl.load(a_ptr + at, mask=held, other=0.0)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0)
    values = ()
    if VALUES > 0:
        kernel = _kernel(_share(share_ptr, at, held, x, P, PADDED, EXPERTS), PADDED, SOFT)
        values = _gather(values_ptr, tl.load(base_ptr + run), nodes, kernel, VALUES, P, PADDED)
    ratio, gradient, free, terms = GATE(x, a, mu, values, OPTIONS)
    tl.store(ratio_ptr + at, ratio, mask=held)
    tl.store(gradient_ptr + at, gradient, mask=held)
    if ROWS > 0:
        _store_sums(sums_ptr, run, terms, kernel, ROWS, P, PADDED)
    out = statistics_ptr + run * SECOND_SUMS
    tl.store(out, _total(mu * a * ratio))
    tl.store(out + 1, _total((mu > 0) & (free == 0)))


@triton.jit
def third_pass(
    x_ptr,
    mu_ptr,
    share_ptr,
    start_ptr,
    length_ptr,
    base_ptr,
    values_ptr,
    gradient_ptr,
    nodes,
    FINISH: tl.constexpr,
    VALUES: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the gradient through aggregates to gradient [N]."""
    run, at, held = _tokens(start_ptr, length_ptr, BLOCK)
    x = _clamped(x_ptr, at, held)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0)
    kernel = _kernel(_share(share_ptr, at, held, x, P, PADDED, EXPERTS), PADDED, SOFT)
    values = _gather(values_ptr, tl.load(base_ptr + run), nodes, kernel, VALUES, P, PADDED)
    gradient = tl.load(gradient_ptr + at, mask=held, other=0.0)
    tl.store(gradient_ptr + at, gradient + FINISH(x, mu, mu > 0, values), mask=held)


@triton.jit
def sum_runs(
    sums_ptr,
    order_ptr,
    offset_ptr,
    table_ptr,
    nodes,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """table[c, n, p]: the sums of node n's runs; order[offset[n]:offset[n + 1]] are its runs, in token order."""
    node = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    p = tl.arange(0, PADDED)
    total = tl.zeros((PADDED,), tl.float64)
    end = tl.load(offset_ptr + node + 1)
    for first in range(tl.load(offset_ptr + node), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        run = tl.load(order_ptr + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (p < P)[None, :]
        total += tl.sum(tl.load(sums_ptr + (run[:, None] * ROWS + c) * P + p[None, :], mask=inside, other=0.0), axis=0)
    tl.store(table_ptr + (c * nodes + node) * P + p, total, mask=p < P)
