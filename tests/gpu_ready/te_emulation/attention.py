"""Attention over packed rows (THD) of Transformer Engine, with context parallelism in zigzag chunks."""

from typing import Any

import torch
from torch import Tensor

from tests.gpu_ready.te_emulation.linear import Gather


def dot_product_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    qkv_format: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    attn_mask_type: str | None = None,
    num_splits: int | None = 1,
) -> Tensor:
    """Return [t, heads * value size] from query [t, heads, d], key [t, groups, d] and value [t, groups, value size].

    With context parallelism the arguments hold this rank's chunks of every sequence, and `cu_seqlens` counts the
    sequences before the cut.
    """
    assert qkv_format == "thd", "only packed rows are emulated"
    assert all(x.dim() == 3 for x in (query, key, value)), "Queries, keys and values must be 3D tensors"
    assert attn_mask_type == "padding_causal" and attention_mask is None
    assert cu_seqlens_q is not None and cu_seqlens_kv is not None
    assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype, "Queries, keys and values must have the same data type!"
    assert query.size(1) == self.num_attention_heads // self.tp_size
    assert key.size(1) == self.num_gqa_groups_per_partition
    group = self.cp_group if self.cp_group is not None and self.cp_group.size() > 1 else None
    bounds = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
    if group is not None:
        assert cu_seqlens_q_padded is not None and cu_seqlens_kv_padded is not None, (
            "cu_seqlens_padded can not be None for context parallelism and qkv_format = 'thd'!"
        )
        assert self.cp_comm_type == "p2p"
    # The project has no padding between sequences, so that both count the same.
    assert bounds.tolist() == cu_seqlens_q.tolist() == cu_seqlens_kv.tolist()
    lengths = bounds.diff().tolist()
    assert max_seqlen_q is not None and max_seqlen_kv is not None and max(lengths) <= min(max_seqlen_q, max_seqlen_kv)
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    assert query.size(0) * size == sum(lengths), f"{query.size(0)} rows on each of {size} ranks, {sum(lengths)} in all"
    if group is not None:
        assert all(length % (2 * size) == 0 for length in lengths), "a sequence does not split into 2 x context chunks"
        key, value = (_in_order(Gather.apply(x, group), lengths, size) for x in (key, value))
    scale = self.fused_attention.softmax_scale  # what the kernel gets; 2.10.0 keeps it there alone
    outs, done_q, done_k = [], 0, 0
    for length in lengths:
        q = query[done_q : done_q + length // size]
        k, v = key[done_k : done_k + length], value[done_k : done_k + length]
        outs.append(_attend(q, k, v, _positions(length, size, rank), scale))
        done_q, done_k = done_q + length // size, done_k + length
    return torch.cat(outs).flatten(1)


def _positions(length: int, size: int, rank: int) -> Tensor:
    """Return the places in a sequence of the two chunks that a rank holds: number `rank` from either end."""
    chunks = torch.arange(length).chunk(2 * size) if size > 1 else (torch.arange(length),)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]) if size > 1 else chunks[0]


def _in_order(gathered: Tensor, lengths: list[int], size: int) -> Tensor:
    """Return rows gathered rank by rank in the order of the sequences."""
    held = gathered.size(0) // size
    places = []
    start = 0
    for length in lengths:
        place = torch.empty(length, dtype=torch.int64)
        for rank in range(size):
            local = start // size + torch.arange(length // size)
            place[_positions(length, size, rank)] = rank * held + local
        places.append(place)
        start += length
    return gathered.index_select(0, torch.cat(places))


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Return one sequence's attention: the query at position p sees the keys up to p."""
    repeat = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale
    hidden = torch.arange(k.size(0))[None, :] > positions[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("hqk,khd->qhd", weights, v)
