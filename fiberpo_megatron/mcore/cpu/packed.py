"""This module computes where the tokens of a packed row are, once per micro-batch for all layers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

_MAX_WASTE = 1.5
"""A bucket holds sequences whose lengths differ by at most this factor."""


@dataclass(frozen=True)
class Bucket:
    """Holds S sequences of similar length as dense grids of row indices; padding slots point at index 0."""

    queries: Tensor
    """int64 [S * q] local rows of the queries."""
    keys: Tensor
    """int64 [S * k] rows of the gathered keys and values."""
    sequences: int
    mask: Tensor | None
    """bool [S, 1, q, k], True where a query sees a key; None for plain causal attention."""


class PackedRow(PackedSeqParams):
    """Describes a packed row in Megatron's sbhd form with batch 1: t positions, sequences kept apart by the core
    attention.

    With the THD form Megatron would loop over the sequences in every rotary embedding; here the embedding is looked up
    by position instead.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, context_rank: int, context_size: int) -> None:
        super().__init__(qkv_format="sbhd", max_seqlen_q=max_seqlen, max_seqlen_kv=max_seqlen)
        self.bounds: NDArray[np.int64] = cu_seqlens.numpy().astype(np.int64)
        self.context_rank = context_rank
        self.context_size = context_size

    @cached_property
    def thd(self) -> PackedSeqParams:
        """Return the same row in THD form, for latent attention."""
        bounds = torch.from_numpy(self.bounds).to(torch.int32)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_kv=self.max_seqlen_kv,
        )

    @cached_property
    def layout(self) -> tuple[list[Bucket], Tensor]:
        """Return the buckets and, as int64 [t], the place of each local row in the buckets' concatenated queries."""
        lengths = np.diff(self.bounds)
        order = np.argsort(lengths, kind="stable")
        buckets: list[Bucket] = []
        rows: list[NDArray[np.int64]] = []  # local row of each query slot, -1 at padding
        first = 0
        for last in range(1, len(order) + 1):
            full = last == len(order) or lengths[order[last]] > _MAX_WASTE * lengths[order[first]]
            if full:
                bucket, slots = self._bucket(order[first:last])
                buckets.append(bucket)
                rows.append(slots)
                first = last
        slots = np.concatenate(rows)
        place = np.empty(int(self.bounds[-1]) // self.context_size, dtype=np.int64)
        place[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
        return buckets, torch.from_numpy(place)

    def _bucket(self, members: NDArray[np.int64]) -> tuple[Bucket, NDArray[np.int64]]:
        queries = [self._local(i, self.context_rank) for i in members]
        query_rows = _grid([rows for rows, _ in queries])
        if self.context_size == 1:
            # Padding on the right needs no mask, because no real query comes after it.
            index = torch.from_numpy(np.maximum(query_rows, 0).ravel())
            return Bucket(index, index, len(members), None), query_rows.ravel()
        keys = [self._everywhere(i) for i in members]
        key_rows = _grid([rows for rows, _ in keys])
        # Padded queries see the first key; their output is dropped.
        query_at = np.maximum(_grid([at for _, at in queries]), 0)
        key_at = _grid([at for _, at in keys])
        mask = (key_at[:, None, :] <= query_at[:, :, None]) & (key_at >= 0)[:, None, :]
        bucket = Bucket(
            torch.from_numpy(np.maximum(query_rows, 0).ravel()),
            torch.from_numpy(np.maximum(key_rows, 0).ravel()),
            len(members),
            torch.from_numpy(mask[:, None]),
        )
        return bucket, query_rows.ravel()

    def _local(self, sequence: int, rank: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows that context-parallel rank `rank` holds of a sequence, and their positions in the
        sequence."""
        start, end = int(self.bounds[sequence]), int(self.bounds[sequence + 1])
        length, size = end - start, self.context_size
        rows = start // size + np.arange(length // size)
        if size == 1:
            return rows, np.arange(length)
        chunk = length // (2 * size)
        begin = np.arange(rank * chunk, (rank + 1) * chunk)
        finish = np.arange(length - (rank + 1) * chunk, length - rank * chunk)
        return rows, np.concatenate([begin, finish])

    def _everywhere(self, sequence: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the same as `_local` for all ranks together: rows of the tensor gathered over the context-parallel
        group."""
        held = int(self.bounds[-1]) // self.context_size
        parts = [self._local(sequence, rank) for rank in range(self.context_size)]
        rows = np.concatenate([rank * held + rows for rank, (rows, _) in enumerate(parts)])
        return rows, np.concatenate([at for _, at in parts])


def _grid(ragged: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the arrays as one grid [S, longest], with -1 at padding."""
    grid = np.full((len(ragged), max(len(row) for row in ragged)), -1, dtype=np.int64)
    for target, row in zip(grid, ragged):
        target[: len(row)] = row
    return grid
