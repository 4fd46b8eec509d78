"""Packing puts token sequences into rows of bounded size, rows onto data-parallel ranks, and rows into tensors.

Its functions are pure functions of the lengths and the layout's numbers. A sequence of L tokens has L - 1 inputs (the
last token is only a label), padded to the layout's multiple.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fiberpo_megatron.types import MicroBatch, RolloutBatch

Rows = list[list[int]]


def padded_lengths(lengths: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Return the row positions that each sequence of `lengths` tokens takes: L - 1 inputs, rounded up to `multiple`."""
    return np.maximum(-(-(lengths - 1) // multiple), 1) * multiple


def assign_rows(
    sizes: Sequence[int] | NDArray[np.int64],
    data_size: int,
    token_budget: int,
    oversized: Literal["error", "own_micro_batch"] = "error",
    multiple_of: int = 1,
    trajectories: NDArray[np.int64] | None = None,
) -> list[Rows]:
    """Spread sequences over `data_size` ranks in rows of at most `token_budget` positions.

    Every rank gets the same number of rows (pipeline and expert parallelism need that), a multiple of `multiple_of`
    (the interleaved pipeline needs that) and about as few as the budget allows. Sequences go to ranks longest first,
    each to the least loaded (Graham's LPT rule), then into rows. `sizes` are padded lengths. Returns, per rank, rows of
    indices into `sizes`; a row may be empty.

    `trajectories` are non-decreasing numbers of what each sequence belongs to; by default each is on its own. Sequences
    of a trajectory come into one row where all of them fit into one, so that a single pass remains possible.

    Raises ValueError for a sequence longer than the budget unless `oversized` gives it a separate row.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if oversized == "error" and len(sizes) and sizes.max() > token_budget:
        worst = int(sizes.argmax())
        of = worst if trajectories is None else int(trajectories[worst])
        raise ValueError(
            f"trajectory {of} takes {sizes[worst]} positions, more than batch.micro_batch_tokens = {token_budget};"
            f' raise it to at least {sizes[worst]}, or set batch.oversized = "own_micro_batch"'
        )
    begins = np.arange(len(sizes)) if trajectories is None else _begins(sizes, trajectories, token_budget)
    units = np.add.reduceat(sizes, begins) if len(begins) < len(sizes) else sizes
    order = np.argsort(-units, kind="stable").tolist()
    shares = _balance(order, units, data_size)
    packed = [_first_fit(share, units, token_budget) for share in shares]
    count = max(1, *(len(rows) for rows in packed))
    count = -(-count // multiple_of) * multiple_of
    ranks = [
        _even(share, units, count, token_budget) or rows + [[]] * (count - len(rows))
        for share, rows in zip(shares, packed)
    ]
    if len(begins) == len(sizes):
        return ranks
    ends = [*begins[1:].tolist(), len(sizes)]
    members = [list(range(begin, end)) for begin, end in zip(begins.tolist(), ends)]
    return [[[index for unit in row for index in members[unit]] for row in rows] for rows in ranks]


def _begins(sizes: NDArray[np.int64], trajectories: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Return where what is packed as one piece begins: a trajectory that fits into a row, or one sequence."""
    begins = np.diff(trajectories, prepend=-1) != 0
    if begins.all():
        return np.arange(len(sizes))
    totals = np.add.reduceat(sizes, np.flatnonzero(begins))
    too_long = (totals > budget)[np.cumsum(begins) - 1]
    return np.flatnonzero(begins | too_long)


def split_trajectories(ranks: Sequence[Rows], trajectories: NDArray[np.int64]) -> int:
    """Return the number of trajectories whose sequences lie in more than one row of an assignment by `assign_rows`."""
    row_of = np.full(len(trajectories), -1)
    for number, row in enumerate(row for rows in ranks for row in rows):
        row_of[row] = number
    apart = (trajectories[1:] == trajectories[:-1]) & (row_of[1:] != row_of[:-1])
    return len(np.unique(trajectories[1:][apart]))


def _balance(order: list[int], sizes: NDArray[np.int64], count: int) -> Rows:
    """Deal indices, longest first, to the least loaded of `count` parts."""
    parts: Rows = [[] for _ in range(count)]
    loads = [(0, part) for part in range(count)]
    for index in order:
        load, part = loads[0]
        parts[part].append(index)
        heapq.heapreplace(loads, (load + int(sizes[index]), part))
    return parts


def _first_fit(order: list[int], sizes: NDArray[np.int64], budget: int) -> Rows:
    """Pack bins by first-fit decreasing; an oversized sequence opens a separate row."""
    rows: Rows = []
    loads: list[int] = []
    for index in order:
        size = int(sizes[index])
        row = next((r for r, load in enumerate(loads) if load + size <= budget), len(rows))
        if row == len(rows):
            rows.append([])
            loads.append(0)
        rows[row].append(index)
        loads[row] += size
    return [sorted(row) for row in rows]


def _even(order: list[int], sizes: NDArray[np.int64], count: int, budget: int) -> Rows | None:
    """Fill the same number of rows evenly if that fits the budget, for steadier memory and pipeline."""
    rows = _balance(order, sizes, count)
    fits = all(len(row) <= 1 or int(sizes[row].sum()) <= budget for row in rows)
    return [sorted(row) for row in rows] if fits else None


@dataclass(frozen=True)
class PackingEfficiency:
    """Says how well one mini-batch is packed and spread over all data-parallel ranks."""

    useful_share: float
    """Input tokens over the positions that are computed; the rest pads sequences and empty rows."""
    imbalance: float
    """Positions of the most loaded rank over the mean, less 1: the share of time that the other ranks wait."""
    micro_batches: int
    """Rows of each rank."""
    split: int = 0
    """Trajectories whose sequences lie in several rows, so that no single row's tokens are a whole trajectory."""


def packing_efficiency(
    lengths: NDArray[np.int64], ranks: Sequence[Rows], sequence_multiple: int, split: int = 0
) -> PackingEfficiency:
    """Return the efficiency of an assignment by `assign_rows`, from the number of tokens of each sequence.

    `split`: what `split_trajectories` says about it.
    """
    sizes = padded_lengths(lengths, sequence_multiple)
    loads = [sum(int(sizes[row].sum()) if row else sequence_multiple for row in rows) for rows in ranks]
    return PackingEfficiency(
        useful_share=float((lengths - 1).sum() / sum(loads)),
        imbalance=max(loads) * len(loads) / sum(loads) - 1,
        micro_batches=len(ranks[0]),
        split=split,
    )


def pack(
    batch: RolloutBatch, rows: Rows, *, sequence_multiple: int, context_rank: int = 0, context_size: int = 1
) -> list[MicroBatch]:
    """Return one MicroBatch per row of sequence indices, cut for this context-parallel rank.

    An empty row becomes one padding sequence with no response token, so that the rank still takes part in every
    collective. `sequence_multiple` must be a multiple of 2 x context_size when context_size > 1.
    """
    if context_size > 1 and sequence_multiple % (2 * context_size):
        raise ValueError(
            f"sequence_multiple = {sequence_multiple} is not a multiple of 2 x context_size = {2 * context_size}"
        )
    offsets = batch.offsets
    return [_pack_row(batch, offsets, row, sequence_multiple, context_rank, context_size) for row in rows]


def _pack_row(
    batch: RolloutBatch,
    offsets: NDArray[np.int64],
    row: list[int],
    multiple: int,
    context_rank: int,
    context_size: int,
) -> MicroBatch:
    inputs = [batch.lengths[i] - 1 for i in row] or [0]
    starts = [offsets[i] for i in row] or [0]
    padded = padded_lengths(np.array(inputs, dtype=np.int64) + 1, multiple).tolist()
    source = np.full(sum(padded), -1, dtype=np.int64)  # flat token index of each input position
    position = np.zeros(sum(padded), dtype=np.int64)
    kept = []
    begin = 0
    for start, count, size in zip(starts, inputs, padded):
        source[begin : begin + count] = np.arange(start, start + count)
        position[begin : begin + size] = np.arange(size)
        kept.append(begin + zigzag(size, context_rank, context_size))
        begin += size
    local = np.concatenate(kept)
    source, position = source[local], position[local]
    real = source >= 0
    tokens = np.where(real, batch.tokens[source], 0)
    labels = np.where(real, batch.tokens[np.where(real, source + 1, 0)], 0)
    response = np.flatnonzero(real & batch.response_mask[np.where(real, source + 1, 0)])
    return MicroBatch(
        tokens=torch.from_numpy(tokens.astype(np.int32)),
        position_ids=torch.from_numpy(position.astype(np.int32)),
        labels=torch.from_numpy(labels.astype(np.int32)),
        response_positions=torch.from_numpy(response.astype(np.int32)),
        response_tokens=torch.from_numpy(source[response] + 1),
        source_tokens=torch.from_numpy(source),
        cu_seqlens=torch.tensor([0, *np.cumsum(padded)], dtype=torch.int32),
        max_seqlen=max(padded),
    )


def zigzag(size: int, context_rank: int, context_size: int) -> NDArray[np.int64]:
    """Return the positions of a sequence of `size` that a context-parallel rank holds: chunks r and 2c-1-r of 2c."""
    if context_size == 1:
        return np.arange(size, dtype=np.int64)
    chunk = size // (2 * context_size)
    first = np.arange(context_rank * chunk, (context_rank + 1) * chunk)
    last = np.arange(size - (context_rank + 1) * chunk, size - context_rank * chunk)
    return np.concatenate([first, last])
