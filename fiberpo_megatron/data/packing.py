"""Packing puts trajectories into rows of bounded size, rows onto data-parallel ranks, and rows into tensors.

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
) -> list[Rows]:
    """Spread sequences over `data_size` ranks in rows of at most `token_budget` positions.

    Every rank gets the same number of rows (pipeline and expert parallelism need that), a multiple of `multiple_of`
    (the interleaved pipeline needs that) and about as few as the budget allows. Sequences go to ranks longest first,
    each to the least loaded (Graham's LPT rule), then into rows. `sizes` are padded lengths. Returns, per rank, rows of
    indices into `sizes`; a row may be empty.

    Raises ValueError for a sequence longer than the budget unless `oversized` gives it a separate row.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if oversized == "error" and len(sizes) and sizes.max() > token_budget:
        worst = int(sizes.argmax())
        raise ValueError(
            f"trajectory {worst} takes {sizes[worst]} positions, more than batch.micro_batch_tokens = {token_budget};"
            f' raise it to at least {sizes[worst]}, or set batch.oversized = "own_micro_batch"'
        )
    order = np.argsort(-sizes, kind="stable").tolist()
    shares = _balance(order, sizes, data_size)
    packed = [_first_fit(share, sizes, token_budget) for share in shares]
    count = max(1, *(len(rows) for rows in packed))
    count = -(-count // multiple_of) * multiple_of
    return [
        _even(share, sizes, count, token_budget) or rows + [[]] * (count - len(rows))
        for share, rows in zip(shares, packed)
    ]


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


def packing_efficiency(lengths: NDArray[np.int64], ranks: Sequence[Rows], sequence_multiple: int) -> PackingEfficiency:
    """Return the efficiency of an assignment by `assign_rows`, from the number of tokens of each trajectory."""
    sizes = padded_lengths(lengths, sequence_multiple)
    loads = [sum(int(sizes[row].sum()) if row else sequence_multiple for row in rows) for rows in ranks]
    return PackingEfficiency(
        useful_share=float((lengths - 1).sum() / sum(loads)),
        imbalance=max(loads) * len(loads) / sum(loads) - 1,
        micro_batches=len(ranks[0]),
    )


def pack(
    batch: RolloutBatch, rows: Rows, *, sequence_multiple: int, context_rank: int = 0, context_size: int = 1
) -> list[MicroBatch]:
    """Return one MicroBatch per row of trajectory indices, cut for this context-parallel rank.

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
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position),
        labels=torch.from_numpy(labels),
        response_positions=torch.from_numpy(response),
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
