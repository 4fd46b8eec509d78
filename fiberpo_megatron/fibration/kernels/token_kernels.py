"""These kernels are the passes over tokens: one program works on a run of at most BLOCK tokens, which share a base
node.

Each program writes its own float64 sums; `run_kernels.sum_runs` adds them per node in the order of the tokens. No float
is added atomically, so results do not depend on how programs are scheduled. Without RUNS (no ids are needed) a program
takes BLOCK tokens. Token tensors are contiguous; PADDED is P rounded up to a power of two; without expert shares P is
1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fiberpo_megatron.fibration import histogram
from fiberpo_megatron.fibration.tokens import MAX_LOG_RATIO, SHARE_TOLERANCE, WIDEST_LOG_RATIO

BINS = tl.constexpr(histogram.BINS)
PADDED_BINS = tl.constexpr(1 << histogram.BINS.bit_length())
SHIFT = tl.constexpr(histogram.SHIFT)
LOWEST = tl.constexpr(histogram.LOWEST)
PER_SIGN = tl.constexpr(histogram.PER_SIGN)
FINE_BITS = tl.constexpr(histogram.FINE_BITS)
FINE_BINS = tl.constexpr(histogram.FINE_BINS)
WIDEST = tl.constexpr(WIDEST_LOG_RATIO)
NARROW = tl.constexpr(MAX_LOG_RATIO)
TOLERANCE = tl.constexpr(SHARE_TOLERANCE)
FIRST_SUMS = tl.constexpr(6)
SECOND_SUMS = tl.constexpr(3)


@triton.jit
def _tokens(start_ptr, size, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's run, the positions of its tokens, and which of them exist."""
    run = tl.program_id(0).to(tl.int64)
    if RUNS:
        at = tl.load(start_ptr + run) + tl.arange(0, BLOCK)
        held = at < tl.load(start_ptr + run + 1)
    else:
        at = run * BLOCK + tl.arange(0, BLOCK)
        held = at < size
    return run, at, held


@triton.jit
def _clamp(x, CLAMP: tl.constexpr):
    return tl.minimum(tl.maximum(x, -CLAMP), CLAMP)


@triton.jit
def _finite(value):
    return (value - value) == 0


@triton.jit
def _share(share_ptr, at, held, like, P: tl.constexpr, PADDED: tl.constexpr, EXPERTS: tl.constexpr):
    """Return omega [BLOCK, PADDED]; it is 1 without experts."""
    if EXPERTS:
        p = tl.arange(0, PADDED)
        inside = held[:, None] & (p < P)[None, :]
        share = tl.load(share_ptr + at[:, None] * P + p[None, :], mask=inside, other=0.0)
    else:
        share = tl.zeros_like(like)[:, None] + 1.0
    return share


@triton.jit
def _kernel(share, PADDED: tl.constexpr, SOFT: tl.constexpr):
    """Return K: omega when soft, one-hot at its first maximum when hard."""
    kernel = share
    if not SOFT:
        best = tl.argmax(share, axis=1, tie_break_left=True)
        kernel = (tl.arange(0, PADDED)[None, :] == best[:, None]).to(share.dtype)
    return kernel


@triton.jit
def _gather(table_ptr, base, nodes, kernel, ROWS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr):
    """Return sum_n K(i, n) table[c, n] per token, for each row c of table [ROWS, nodes, P]."""
    p = tl.arange(0, PADDED)
    values = ()
    for c in tl.static_range(ROWS):
        row = tl.load(table_ptr + (c * nodes + base) * P + p, mask=p < P, other=0.0)
        values = values + (tl.sum(kernel * row[None, :], axis=1),)
    return values


@triton.jit
def _store_sums(sums_ptr, run, terms, kernel, ROWS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr):
    """Store sums[run, c, p] = sum_i K(i, p) terms[c]_i, in float64."""
    p = tl.arange(0, PADDED)
    for c in tl.static_range(ROWS):
        total = tl.sum((kernel * terms[c][:, None]).to(tl.float64), axis=0)
        tl.store(sums_ptr + (run * ROWS + c) * P + p, total, mask=p < P)


@triton.jit
def _total(value):
    return tl.sum(value.to(tl.float64), axis=0)


@triton.jit
def _bin(x):
    """Return the bin of `histogram.histogram`."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = ((bits & 0x7FFFFFFF) >> SHIFT) - (LOWEST - 1)
    magnitude = tl.minimum(tl.maximum(magnitude, 0), PER_SIGN)
    return tl.where(bits < 0, PER_SIGN - magnitude, PER_SIGN + magnitude)


@triton.jit
def _count_bins(bins_ptr, x, counted):
    """Add the block to the histogram; its counts are integers, so the order does not matter."""
    counts = tl.histogram(tl.where(counted, _bin(x), PADDED_BINS - 1), PADDED_BINS)
    place = tl.arange(0, PADDED_BINS)
    tl.atomic_add(bins_ptr + place, counts, mask=(place < BINS) & (counts > 0))


@triton.jit
def place_maximum(bins_ptr, max_ptr, fine_ptr):
    """Write `histogram.fine_position`: fine [FINE_BINS] of max (float64) inside the highest bin that holds a token.

    One program does this.
    """
    place = tl.arange(0, PADDED_BINS)
    counts = tl.load(bins_ptr + place, mask=place < BINS, other=0.0)
    top = tl.max(tl.where(counts > 0, place, -1), axis=0)
    value = tl.load(max_ptr + tl.arange(0, 1)).to(tl.float32)
    fine = (value.to(tl.int32, bitcast=True) >> (SHIFT - FINE_BITS)) & (FINE_BINS - 1)
    row = tl.arange(0, FINE_BINS)
    tl.store(fine_ptr + row, ((row == fine) & (_bin(value) == top) & (value > -2.0 * WIDEST)).to(tl.float64))


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["bins_ptr", "tokens_ptr"])
def first_pass(
    x_ptr,
    mu_ptr,
    share_ptr,
    start_ptr,
    trajectory_ptr,
    sums_ptr,
    statistics_ptr,
    max_ptr,
    bins_ptr,
    tokens_ptr,
    size,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    STATISTICS: tl.constexpr,
    TRAJECTORIES: tl.constexpr,
    RUNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Write node sums [runs, ROWS, P] and, with STATISTICS, `TokenStatistics`' sums [runs, 6], the largest log ratio
    [runs], the histogram and the tokens that count per trajectory."""
    run, at, held = _tokens(start_ptr, size, RUNS, BLOCK)
    x = _clamp(tl.load(x_ptr + at, mask=held, other=0.0), CLAMP)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0)
    counted = mu > 0
    share = _share(share_ptr, at, held, x, P, PADDED, EXPERTS)
    if ROWS > 0:
        _store_sums(sums_ptr, run, TERMS(x, mu, counted), _kernel(share, PADDED, SOFT), ROWS, P, PADDED)
    if STATISTICS:
        ratio = tl.exp(x)
        weighted = ratio * mu
        out = statistics_ptr + run * FIRST_SUMS
        tokens = tl.sum(counted.to(tl.int32), axis=0)
        tl.store(out, tokens.to(tl.float64))
        tl.store(out + 1, _total(tl.where(counted, ratio, 0.0)))
        tl.store(out + 2, _total(mu))
        tl.store(out + 3, _total(weighted))
        if CLAMP > NARROW:  # the square of a ratio above exp(44) overflows float32
            tl.store(out + 4, _total(weighted.to(tl.float64) * ratio.to(tl.float64)))
        else:
            tl.store(out + 4, _total(weighted * ratio))
        entropy = tl.zeros_like(x)
        if EXPERTS:
            entropy = tl.sum(tl.where(share > 0, share * tl.log(tl.where(share > 0, share, 1.0)), 0.0), axis=1)
        tl.store(out + 5, -_total(mu * entropy))
        tl.store(max_ptr + run, tl.max(tl.where(held, x.to(tl.float64), -float("inf")), axis=0))
        _count_bins(bins_ptr, x, counted)
        if TRAJECTORIES:
            tl.atomic_add(tokens_ptr + tl.load(trajectory_ptr + run), tokens)


@triton.jit
def _malformed(x, a, mu, share, held, EXPERTS: tl.constexpr):
    """Return which tokens `tokens.check_values` refuses."""
    bad = ~(_finite(x) & _finite(a) & _finite(mu) & (mu >= 0))
    if EXPERTS:
        error = tl.abs(tl.sum(share, axis=1) - 1.0)
        bad = bad | ~(error <= TOLERANCE) | (tl.max((share < 0).to(tl.int32), axis=1) > 0)
    return bad & held


@triton.jit(do_not_specialize=["size", "nodes"], do_not_specialize_on_alignment=["clipped_ptr"])
def second_pass(
    x_ptr,
    a_ptr,
    mu_ptr,
    share_ptr,
    start_ptr,
    base_ptr,
    trajectory_ptr,
    values_ptr,
    ratio_ptr,
    gradient_ptr,
    sums_ptr,
    statistics_ptr,
    clipped_ptr,
    size,
    nodes,
    GATE: tl.constexpr,
    OPTIONS: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    TRAJECTORIES: tl.constexpr,
    RUNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Write G and the direct gradient [N], adjoint sums [runs, ROWS, P], clipped tokens per trajectory, and [runs, 3]:
    value, clipped and malformed tokens."""
    run, at, held = _tokens(start_ptr, size, RUNS, BLOCK)
    raw = tl.load(x_ptr + at, mask=held, other=0.0)
    x = _clamp(raw, CLAMP)
    a = tl.load(a_ptr + at, mask=held, other=0.0)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0)
    share = _share(share_ptr, at, held, x, P, PADDED, EXPERTS)
    kernel = _kernel(share, PADDED, SOFT)
    values = ()
    if VALUES > 0:
        values = _gather(values_ptr, tl.load(base_ptr + run), nodes, kernel, VALUES, P, PADDED)
    ratio, gradient, free, terms = GATE(x, a, mu, values, OPTIONS)
    tl.store(ratio_ptr + at, ratio, mask=held)
    tl.store(gradient_ptr + at, tl.where(tl.abs(raw) > CLAMP, 0.0, gradient), mask=held)
    if ROWS > 0:
        _store_sums(sums_ptr, run, terms, kernel, ROWS, P, PADDED)
    clipped = tl.sum(((mu > 0) & (free == 0)).to(tl.int32), axis=0)
    out = statistics_ptr + run * SECOND_SUMS
    tl.store(out, _total(mu * a * ratio))
    tl.store(out + 1, clipped.to(tl.float64))
    tl.store(out + 2, _total(_malformed(raw, a, mu, share, held, EXPERTS)))
    if TRAJECTORIES:
        tl.atomic_add(clipped_ptr + tl.load(trajectory_ptr + run), clipped)


@triton.jit(do_not_specialize=["nodes"])
def third_pass(
    x_ptr,
    a_ptr,
    mu_ptr,
    share_ptr,
    start_ptr,
    base_ptr,
    values_ptr,
    more_ptr,
    gradient_ptr,
    nodes,
    FINISH: tl.constexpr,
    OPTIONS: tl.constexpr,
    VALUES: tl.constexpr,
    MORE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Add the gradient through aggregates to gradient [N]; `more` holds node values beside the adjoints `values`.

    Without `more`, a program whose node's adjoints are all zero, as they are while no gate or clip is active, reads no
    token.
    """
    run, at, held = _tokens(start_ptr, 0, True, BLOCK)
    base = tl.load(base_ptr + run)
    p = tl.arange(0, PADDED)
    active = tl.full((PADDED,), MORE, tl.int32)
    for c in tl.static_range(VALUES):
        active = active | (tl.load(values_ptr + (c * nodes + base) * P + p, mask=p < P, other=0.0) != 0).to(tl.int32)
    if tl.max(active, axis=0) > 0:
        raw = tl.load(x_ptr + at, mask=held, other=0.0)
        x = _clamp(raw, CLAMP)
        a = tl.load(a_ptr + at, mask=held, other=0.0)  # no load where FINISH does not use it
        mu = tl.load(mu_ptr + at, mask=held, other=0.0)
        kernel = _kernel(_share(share_ptr, at, held, x, P, PADDED, EXPERTS), PADDED, SOFT)
        values = _gather(values_ptr, base, nodes, kernel, VALUES, P, PADDED)
        more = ()
        if MORE > 0:
            more = _gather(more_ptr, base, nodes, kernel, MORE, P, PADDED)
        added = FINISH(x, a, mu, values, more, OPTIONS)
        gradient = tl.load(gradient_ptr + at, mask=held, other=0.0)
        tl.store(gradient_ptr + at, gradient + tl.where(tl.abs(raw) > CLAMP, 0.0, added), mask=held)
