"""These kernels are the passes over tokens: one program works on a run of at most BLOCK tokens, which share a base
node.

Each program writes its own sums as integers (`exact_sums`), which `run_kernels.sum_runs` adds per node: results depend
neither on the order of tokens nor on how programs are scheduled. Without RUNS (no ids are needed) a program
takes BLOCK tokens. Token tensors are contiguous; PADDED is P rounded up to a power of two; without expert shares P is
1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fiberpo_megatron.fibration import histogram
from fiberpo_megatron.fibration.kernels.exact_sums import share_parts, store_products, store_total
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
def _store_sums(
    sums_ptr,
    flag_ptr,
    run,
    terms,
    kernel,
    ROWS: tl.constexpr,
    TOPS: tl.constexpr,
    LIMBS: tl.constexpr,
    FIRST: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Store the limbs of sum_i K(i, p) terms[c]_i in sums[run, FIRST[c]..., p]."""
    out = sums_ptr + run * FIRST[ROWS] * P
    p = tl.arange(0, PADDED)
    if EXPERTS:
        parts = share_parts(kernel)
    beyond = 0
    for c in tl.static_range(ROWS):
        term = terms[c].to(tl.float64)
        row = out + FIRST[c] * P
        if EXPERTS:
            beyond = beyond | store_products(row + p, P, term, parts, p < P, TOPS[c], LIMBS[c])
        else:
            beyond = beyond | store_total(row, term, TOPS[c], LIMBS[c])
    tl.atomic_max(flag_ptr, beyond)


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


@triton.jit(
    do_not_specialize=["size"],
    do_not_specialize_on_alignment=["trajectory_ptr", "bins_ptr", "tokens_ptr", "flag_ptr"],
)
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
    flag_ptr,
    size,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    TOPS: tl.constexpr,
    LIMBS: tl.constexpr,
    FIRST: tl.constexpr,
    STATISTICS: tl.constexpr,
    STATISTIC_TOPS: tl.constexpr,
    STATISTIC_LIMBS: tl.constexpr,
    STATISTIC_FIRST: tl.constexpr,
    TRAJECTORIES: tl.constexpr,
    RUNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Write the limbs of node sums [runs, limbs, P] and, with STATISTICS, of `TokenStatistics`' sums [runs, limbs], the
    largest log ratio [runs], the histogram and the tokens that count per trajectory. flag becomes 1 if a term is beyond
    its range."""
    run, at, held = _tokens(start_ptr, size, RUNS, BLOCK)
    x = _clamp(tl.load(x_ptr + at, mask=held, other=0.0), CLAMP)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0)
    counted = mu > 0
    share = _share(share_ptr, at, held, x, P, PADDED, EXPERTS)
    if ROWS > 0:
        terms, kernel = TERMS(x, mu, counted), _kernel(share, PADDED, SOFT)
        _store_sums(sums_ptr, flag_ptr, run, terms, kernel, ROWS, TOPS, LIMBS, FIRST, P, PADDED, EXPERTS)
    if STATISTICS:
        ratio = tl.exp(x)
        weighted = ratio * mu
        tokens = tl.sum(counted.to(tl.int32), axis=0)
        if CLAMP > NARROW:  # noqa: SIM108  (branches differ in type) the square of a ratio above exp(44) overflows float32
            square = weighted.to(tl.float64) * ratio.to(tl.float64)
        else:
            square = weighted * ratio
        entropy = tl.zeros_like(x)
        if EXPERTS:
            entropy = tl.sum(tl.where(share > 0, share * tl.log(tl.where(share > 0, share, 1.0)), 0.0), axis=1)
        values = (tl.where(counted, ratio, 0.0), mu, weighted, square, -(mu * entropy))
        out = statistics_ptr + run * STATISTIC_FIRST[5]
        beyond = 0
        for c in tl.static_range(5):
            row = out + STATISTIC_FIRST[c]
            beyond = beyond | store_total(row, values[c].to(tl.float64), STATISTIC_TOPS[c], STATISTIC_LIMBS[c])
        tl.atomic_max(flag_ptr, beyond)
        tl.store(max_ptr + run, tl.max(tl.where(counted, x.to(tl.float64), -float("inf")), axis=0))
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


@triton.jit
def _store_largest(out_ptr, run, at, gradient, a, mu):
    """Store out[run] = the block's largest |c| / (mu |A|), and the first token that has it."""
    scale = tl.abs(mu * a)
    size = tl.where(scale > 0, tl.abs(gradient) / tl.where(scale > 0, scale, 1.0), 0.0)
    largest = tl.max(size, axis=0)
    tl.store(out_ptr + 2 * run, largest.to(tl.float64))
    tl.store(out_ptr + 2 * run + 1, tl.min(tl.where(size == largest, at, 1 << 62), axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["runs"])
def find_largest(
    largest_ptr,
    base_ptr,
    x_ptr,
    mu_ptr,
    share_ptr,
    gradient_ptr,
    out_ptr,
    runs,
    EXPERTS: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write out [4 + P]: the largest |c| / (mu |A|) of `largest` [runs, 2], and of its token the base node, whether x
    is at least 0, c / mu, and the expert shares.

    Of several tokens it takes the first one of the first base node. One program does this.
    """
    row = tl.arange(0, BLOCK)
    best = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, runs, BLOCK):
        best = tl.maximum(best, tl.load(largest_ptr + 2 * (first + row), mask=first + row < runs, other=0.0))
    largest = tl.max(best, axis=0)
    base = tl.full((BLOCK,), 1 << 62, tl.int64)
    for first in range(0, runs, BLOCK):
        size = tl.load(largest_ptr + 2 * (first + row), mask=first + row < runs, other=-1.0)
        base = tl.minimum(base, tl.load(base_ptr + first + row, mask=size == largest, other=1 << 62))
    node = tl.min(base, axis=0)
    token = tl.full((BLOCK,), 1 << 62, tl.float64)
    for first in range(0, runs, BLOCK):
        size = tl.load(largest_ptr + 2 * (first + row), mask=first + row < runs, other=-1.0)
        mine = (size == largest) & (tl.load(base_ptr + first + row, mask=size == largest, other=-1) == node)
        token = tl.minimum(token, tl.load(largest_ptr + 2 * (first + row) + 1, mask=mine, other=1 << 62))
    at = tl.min(token, axis=0).to(tl.int64)
    found = largest > 0
    mu = tl.load(mu_ptr + at, mask=found, other=1.0).to(tl.float64)
    tl.store(out_ptr, largest)
    tl.store(out_ptr + 1, node.to(tl.float64))
    tl.store(out_ptr + 2, (tl.load(x_ptr + at, mask=found, other=0.0) >= 0).to(tl.float64))
    tl.store(out_ptr + 3, tl.load(gradient_ptr + at, mask=found, other=0.0).to(tl.float64) / mu)
    if EXPERTS:
        p = tl.arange(0, PADDED)
        share = tl.load(share_ptr + at * P + p, mask=p < tl.where(found, P, 0), other=0.0)
        tl.store(out_ptr + 4 + p, share.to(tl.float64), mask=p < P)


@triton.jit(
    do_not_specialize=["size", "nodes"],
    do_not_specialize_on_alignment=["base_ptr", "trajectory_ptr", "clipped_ptr", "flag_ptr"],
)
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
    flag_ptr,
    largest_ptr,
    size,
    nodes,
    GATE: tl.constexpr,
    OPTIONS: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    TOPS: tl.constexpr,
    LIMBS: tl.constexpr,
    FIRST: tl.constexpr,
    VALUE_TOP: tl.constexpr,
    VALUE_LIMBS: tl.constexpr,
    LARGEST: tl.constexpr,
    TRAJECTORIES: tl.constexpr,
    RUNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SOFT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Write G and the direct gradient [N], the limbs of adjoint sums [runs, limbs, P], clipped tokens per trajectory,
    and [runs, 2 + VALUE_LIMBS]: clipped and malformed tokens, and the limbs of the value."""
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
    gradient = tl.where(tl.abs(raw) > CLAMP, 0.0, gradient + 0.0)  # no -0.0, as in torch
    tl.store(gradient_ptr + at, gradient, mask=held)
    if LARGEST:
        _store_largest(largest_ptr, run, at, gradient, a, mu)
    if ROWS > 0:
        _store_sums(sums_ptr, flag_ptr, run, terms, kernel, ROWS, TOPS, LIMBS, FIRST, P, PADDED, EXPERTS)
    clipped = tl.sum(((mu > 0) & (free == 0)).to(tl.int32), axis=0)
    malformed = tl.sum(_malformed(raw, a, mu, share, held, EXPERTS).to(tl.int64), axis=0)
    out = statistics_ptr + run * (2 + VALUE_LIMBS)
    tl.store(out, clipped.to(tl.int64))
    tl.store(out + 1, malformed)
    beyond = store_total(out + 2, (mu * a * ratio).to(tl.float64), VALUE_TOP, VALUE_LIMBS)
    tl.atomic_max(flag_ptr, beyond)
    if TRAJECTORIES:
        tl.atomic_add(clipped_ptr + tl.load(trajectory_ptr + run), clipped)


@triton.jit(do_not_specialize=["nodes"], do_not_specialize_on_alignment=["base_ptr"])
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
    largest_ptr,
    nodes,
    FINISH: tl.constexpr,
    OPTIONS: tl.constexpr,
    VALUES: tl.constexpr,
    MORE: tl.constexpr,
    LARGEST: tl.constexpr,
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
        gradient = tl.load(gradient_ptr + at, mask=held, other=0.0) + tl.where(tl.abs(raw) > CLAMP, 0.0, added)
        tl.store(gradient_ptr + at, gradient, mask=held)
        if LARGEST:
            _store_largest(largest_ptr, run, at, gradient, a, mu)
