"""These kernels work on the nodes of a tree: they do what `tree.py` and `gates.py` do in torch, on dense tables and
without a wait.

Levels are numbered from fine (0) to coarse (LEVELS - 1). A finest node is (base node b, partition p), at b * P + p of
tables [..., nodes, P]. The coarser levels share one table [..., total]: place[level - 1, b], plus p if the level has
the key "expert", is the entry of a finest node's ancestor, and place is -1 where b holds no token. Sums over a node's
members run over `reach`, the span of base nodes between its first and its last, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fiberpo_megatron.fibration.kernels.exact_sums import decoded, limb_of

MASS = tl.constexpr(0)
COUNT = tl.constexpr(1)


@triton.jit
def _lanes(first, nodes, P: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Return base nodes [BLOCK] from `first` on and which exist, and entries [BLOCK, PADDED] of a table and which
    exist."""
    b = (first + tl.arange(0, BLOCK)).to(tl.int64)
    p = tl.arange(0, PADDED)
    inside = b < nodes
    return b, inside, b[:, None] * P + p[None, :], inside[:, None] & (p < P)[None, :]


@triton.jit(do_not_specialize=["nodes", "total"], do_not_specialize_on_alignment=["reach_ptr", "flag_ptr"])
def place_nodes(
    sums_ptr,
    parent_ptr,
    place_ptr,
    reach_ptr,
    flag_ptr,
    sizes,
    strides,
    offsets,
    nodes,
    total,
    LEVELS: tl.constexpr,
    BASE: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write place [LEVELS - 1, nodes], and reach [2, total]: nodes less a node's first base node, and its last one plus
    1.

    sizes: per base key, then per coarser key. strides: per coarser level and key, how far one id moves its place. flag
    becomes 1 if a base node reports several ids of a coarser key.
    """
    b, inside, at, held = _lanes(tl.program_id(0) * BLOCK, nodes, P, PADDED, BLOCK)
    mass = tl.load(sums_ptr + at, mask=held, other=0.0)
    present = tl.max((mass > 0).to(tl.int32), axis=1) > 0
    ids = ()
    rest = b
    for i in tl.static_range(BASE):
        size = sizes[BASE - 1 - i]
        ids = (rest % size,) + ids
        rest = rest // size
    odd = b < 0
    for k in tl.static_range(len(sizes) - BASE):
        reports = tl.load(parent_ptr + b, mask=inside, other=0.0)
        seen = tl.load(parent_ptr + (1 + 2 * k) * nodes + b, mask=inside, other=0.0)
        squares = tl.load(parent_ptr + (2 + 2 * k) * nodes + b, mask=inside, other=0.0)
        odd = odd | (reports * squares - seen * seen > 0.5 + 1e-15 * seen * seen)
        ids = ids + (tl.floor(seen / tl.maximum(reports, 1.0) + 0.5).to(tl.int64),)
    tl.atomic_max(flag_ptr, tl.max((odd & present).to(tl.int32), axis=0))
    for level in tl.static_range(LEVELS - 1):
        place = b * 0 + offsets[level]
        for k in tl.static_range(len(sizes)):
            place += ids[k] * strides[level * len(sizes) + k]
        tl.store(place_ptr + level * nodes + b, tl.where(present, place, -1), mask=inside)
        tl.atomic_max(reach_ptr + place, (nodes - b).to(tl.int32), mask=present)
        tl.atomic_max(reach_ptr + total + place, (b + 1).to(tl.int32), mask=present)


@triton.jit
def _coarse(counts, offsets, experts, level, P: tl.constexpr, LEVELS: tl.constexpr):
    """Return for coarser level `level` its number of nodes (partitions not counted), first entry, and 1 with
    "expert"."""
    count = level * 0
    offset = level * 0
    expert = level * 0
    for other in tl.static_range(LEVELS - 1):
        count = tl.where(level == other, counts[other], count)
        offset = tl.where(level == other, offsets[other], offset)
        expert = tl.where(level == other, experts[other], expert)
    return count, offset, expert


@triton.jit
def _joined(column, expert):
    """Return sums per partition [PADDED] as they are with "expert", else their total in place of each."""
    return tl.where(expert > 0, column, tl.sum(column, axis=0))


@triton.jit(do_not_specialize=["nodes", "total"], do_not_specialize_on_alignment=["reach_ptr", "flag_ptr"])
def sum_up(
    sums_ptr,
    stopped_ptr,
    place_ptr,
    reach_ptr,
    out_ptr,
    flag_ptr,
    counts,
    offsets,
    experts,
    nodes,
    total,
    ADJOINT: tl.constexpr,
    ROWS: tl.constexpr,
    TOPS: tl.constexpr,
    LIMBS: tl.constexpr,
    FIRST: tl.constexpr,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to out [ROWS, total] the sums over each coarser node's finest nodes of sums [..., nodes, P].

    It sums its ROWS rows, by limbs as `exact.sum_by_index` does. With ADJOINT it sums row 0, W, and both channels'
    (1 - g') W of the level below, which `gate_nodes` left in stopped [LEVELS, 2, nodes, P], in float64. flag becomes 1
    if base nodes of one node lie in several nodes of the next level.
    """
    level = tl.program_id(1)
    count, offset, expert = _coarse(counts, offsets, experts, level, P, LEVELS)
    node = tl.program_id(0)
    if node < count:
        p = tl.arange(0, PADDED)
        target = (offset + node * tl.where(expert > 0, P, 1)).to(tl.int64)
        end = tl.load(reach_ptr + total + target)
        begin = tl.where(end > 0, nodes - tl.load(reach_ptr + target), 0)
        low = tl.full((BLOCK,), 1 << 30, tl.int64)
        high = tl.full((BLOCK,), -1, tl.int64)
        entries = (p < P) & ((expert > 0) | (p == 0))
        for row in tl.static_range(ROWS):
            if ADJOINT:
                column = tl.zeros((PADDED,), tl.float64)
                for first in range(begin, end, BLOCK):
                    b, inside, at, held = _lanes(first, nodes, P, PADDED, BLOCK)
                    member = inside & (tl.load(place_ptr + level * nodes + b, mask=inside, other=-1) == target)
                    held = held & member[:, None]
                    value = tl.load(sums_ptr + at, mask=held, other=0.0)
                    if row > 0:
                        slope = stopped_ptr + (level * 2 + row - 1) * nodes * P
                        value = value * tl.load(slope + at, mask=held, other=0.0)
                    column += tl.sum(value, axis=0)
                tl.store(out_ptr + row * total + target + p, _joined(column, expert), mask=entries)
            else:
                value = _exact_row(
                    sums_ptr + row * nodes * P,
                    place_ptr + level * nodes,
                    target,
                    begin,
                    end,
                    expert,
                    nodes,
                    TOPS[row],
                    LIMBS[row],
                    P,
                    PADDED,
                    BLOCK,
                )
                tl.store(out_ptr + row * total + target + p, value, mask=entries)
        if not ADJOINT:
            for first in range(begin, end, BLOCK):
                b, inside, at, held = _lanes(first, nodes, P, PADDED, BLOCK)
                member = inside & (tl.load(place_ptr + level * nodes + b, mask=inside, other=-1) == target)
                above = member & (level + 2 < LEVELS)
                next_place = tl.load(place_ptr + (level + 1) * nodes + b, mask=above, other=-1)
                low = tl.minimum(low, tl.where(above, next_place, 1 << 30))
                high = tl.maximum(high, next_place)
            lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
            tl.atomic_max(flag_ptr, ((highest >= 0) & (lowest != highest)).to(tl.int32))


@triton.jit
def _exact_row(
    sums_ptr,
    place_ptr,
    target,
    begin,
    end,
    expert,
    nodes,
    TOP: tl.constexpr,
    COUNT: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the sums [PADDED] of one row over the base nodes begin..end that lie in node `target`."""
    limbs = ()
    for limb in tl.static_range(COUNT):
        column = tl.zeros((PADDED,), tl.int64)
        for first in range(begin, end, BLOCK):
            b, inside, at, held = _lanes(first, nodes, P, PADDED, BLOCK)
            member = inside & (tl.load(place_ptr + b, mask=inside, other=-1) == target)
            value = tl.load(sums_ptr + at, mask=held & member[:, None], other=0.0)
            column += tl.sum(limb_of(value, limb, TOP), axis=0)
        limbs = limbs + (_joined(column, expert),)
    value, _ = decoded(limbs, TOP, COUNT)
    return value


@triton.jit
def _gate(residual, budget, tokens):
    """Return value and slope of equation 4 of arXiv:2604.03044, as `gates.gate` does."""
    size = tl.abs(residual)
    passed = size <= budget
    rolled = (size < (1.0 + 1.0 / tokens) * budget) & ~passed
    sign = tl.where(residual < 0, -1.0, 1.0)
    rollback = sign * ((tokens + 1.0) * budget) - tokens * residual
    return tl.where(passed, residual, tl.where(rolled, rollback, 0.0)), tl.where(
        passed, 1.0, tl.where(rolled, -tokens, 0.0)
    )


@triton.jit
def _row(table_ptr, row: tl.constexpr, size, at, held, other):
    return tl.load(table_ptr + row * size + at, mask=held, other=other)


@triton.jit(do_not_specialize=["nodes", "total"])
def gate_nodes(
    sums_ptr,
    coarse_ptr,
    place_ptr,
    values_ptr,
    stopped_ptr,
    budget_ptr,
    experts,
    starts,
    widths,
    nodes,
    total,
    BUDGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    K_MAX: tl.constexpr,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write values [3, nodes, P] (S+, S- and the log base weights' sum over levels) and stopped [LEVELS, 2, nodes, P]
    (1 - g').

    It does what `gates.gate_tree` does, once per finest node. BUDGETS are (C+, C-) per level. Where SOURCES[level] is
    not -1, nodes have budgets of their own: C+ at starts[level] plus the entry of the finest node's ancestor in that
    source level, and C- widths[level] further. K_MAX is the largest k of a gate, or None.
    """
    b, inside, at, held = _lanes(tl.program_id(0) * BLOCK, nodes, P, PADDED, BLOCK)
    size = nodes * P
    mass = _row(sums_ptr, 0, size, at, held, 0.0)
    held = held & (mass > 0)
    mass = tl.where(held, mass, 1.0)
    tokens = tl.maximum(_row(sums_ptr, 1, size, at, held, 1.0), 1.0)
    plus = _row(sums_ptr, 2, size, at, held, 0.0) / mass
    minus = _row(sums_ptr, 3, size, at, held, 0.0) / mass
    inner = (tl.arange(0, PADDED) < P)[None, :] & inside[:, None]
    tl.store(values_ptr + at, plus.to(values_ptr.dtype.element_ty), mask=inner)
    tl.store(values_ptr + size + at, minus.to(values_ptr.dtype.element_ty), mask=inner)
    log_weight = mass * 0.0
    for level in tl.static_range(LEVELS):
        own_plus, own_minus, k = plus, minus, tokens
        if level + 1 < LEVELS:
            up = tl.load(place_ptr + level * nodes + b, mask=inside, other=0)[:, None]
            up += tl.arange(0, PADDED)[None, :] * experts[level]
            mass = _row(coarse_ptr, 0, total, up, held, 1.0)
            tokens = tl.maximum(_row(coarse_ptr, 1, total, up, held, 1.0), 1.0)
            plus = _row(coarse_ptr, 2, total, up, held, 0.0) / mass
            minus = _row(coarse_ptr, 3, total, up, held, 0.0) / mass
            own_plus -= plus
            own_minus -= minus
        if K_MAX is not None:
            k = tl.minimum(k, tl.full((), K_MAX, tl.float64))
        c_plus = tl.full((), BUDGETS[2 * level], tl.float64)
        c_minus = tl.full((), BUDGETS[2 * level + 1], tl.float64)
        if SOURCES[level] >= 0:
            entry = at + starts[level]
            if SOURCES[level] > 0:
                source = tl.load(place_ptr + (SOURCES[level] - 1) * nodes + b, mask=inside, other=0)[:, None]
                entry = source + tl.arange(0, PADDED)[None, :] * experts[SOURCES[level] - 1] + starts[level]
            c_plus = tl.load(budget_ptr + entry, mask=held, other=1.0)
            c_minus = tl.load(budget_ptr + entry + widths[level], mask=held, other=1.0)
        value, slope = _gate(own_plus, c_plus, k)
        log_weight += value
        tl.store(stopped_ptr + 2 * level * size + at, 1.0 - slope, mask=inner)
        value, slope = _gate(own_minus, c_minus, k)
        log_weight -= value
        tl.store(stopped_ptr + (2 * level + 1) * size + at, 1.0 - slope, mask=inner)
    tl.store(values_ptr + 2 * size + at, log_weight.to(values_ptr.dtype.element_ty), mask=inner)


@triton.jit(do_not_specialize=["nodes", "total"])
def adjoin_nodes(
    sums_ptr,
    coarse_ptr,
    first_ptr,
    first_coarse_ptr,
    place_ptr,
    stopped_ptr,
    values_ptr,
    experts,
    nodes,
    total,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write values [2, nodes, P], which tokens of each channel receive, as `gates.adjoint` does.

    sums [3, nodes, P] are W and what the fiber clips stop, coarse [3, total] comes from `sum_up`; first holds the sums
    of `gate_nodes`.
    """
    b, inside, at, held = _lanes(tl.program_id(0) * BLOCK, nodes, P, PADDED, BLOCK)
    size = nodes * P
    inner = held
    mass = _row(first_ptr, 0, size, at, held, 0.0)
    held = held & (mass > 0)
    mass = tl.where(held, mass, 1.0)
    weight = _row(sums_ptr, 0, size, at, held, 0.0)
    handed_plus = _row(sums_ptr, 1, size, at, held, 0.0)
    handed_minus = _row(sums_ptr, 2, size, at, held, 0.0)
    plus = mass * 0.0
    minus = mass * 0.0
    for level in tl.static_range(LEVELS):
        if level > 0:
            up = tl.load(place_ptr + (level - 1) * nodes + b, mask=inside, other=0)[:, None]
            up += tl.arange(0, PADDED)[None, :] * experts[level - 1]
            mass = _row(first_coarse_ptr, 0, total, up, held, 1.0)
            weight = _row(coarse_ptr, 0, total, up, held, 0.0)
            handed_plus = _row(coarse_ptr, 1, total, up, held, 0.0)
            handed_minus = _row(coarse_ptr, 2, total, up, held, 0.0)
        stopped_plus = tl.load(stopped_ptr + 2 * level * size + at, mask=held, other=0.0)
        stopped_minus = tl.load(stopped_ptr + (2 * level + 1) * size + at, mask=held, other=0.0)
        plus += (handed_plus - stopped_plus * weight) / mass
        minus += (handed_minus - stopped_minus * weight) / mass
    tl.store(values_ptr + at, plus.to(values_ptr.dtype.element_ty), mask=inner)
    tl.store(values_ptr + size + at, minus.to(values_ptr.dtype.element_ty), mask=inner)
