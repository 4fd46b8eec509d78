"""Permutations of tokens of Transformer Engine: by a map of tokens to experts, and of whole chunks."""

from typing import Any

import torch
from torch import Tensor

FUNCTIONS = (
    "moe_permute",
    "moe_permute_with_probs",
    "moe_unpermute",
    "moe_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs",
)


def _places(routing_map: Tensor, rows: int) -> Tensor:
    """Return int64 [tokens, experts]: the row of every token in its experts' output, and -1 where it has none."""
    assert routing_map.dtype in (torch.bool, torch.int32), routing_map.dtype
    chosen = routing_map.bool()
    flat = chosen.T.reshape(-1)
    assert rows == int(flat.sum()), f"num_out_tokens is {rows}, the map has {int(flat.sum())} entries"
    order = torch.where(flat, flat.cumsum(0) - 1, torch.full_like(flat, -1, dtype=torch.int64))
    return order.view(chosen.size(1), chosen.size(0)).T.contiguous()


def _sources(places: Tensor) -> Tensor:
    """Return int64 [rows]: the token of every row."""
    by_expert = places.T.reshape(-1)
    tokens = torch.arange(places.size(0)).repeat(places.size(1))
    return tokens[by_expert >= 0]


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    """Return the tokens [rows, hidden] grouped by expert, and the map that undoes it."""
    assert map_type == "mask"
    places = _places(routing_map, num_out_tokens)
    return inp.index_select(0, _sources(places)), places


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens and the probabilities [rows] grouped by expert, and the map that undoes it."""
    assert inp.size(0) == routing_map.size(0) == probs.size(0)
    rows, places = moe_permute(inp, routing_map, num_out_tokens)
    return rows, probs.T.reshape(-1)[(places.T.reshape(-1) >= 0).nonzero().flatten()], places


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: Any = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
) -> Tensor:
    """Return the sum of every token's rows [tokens, hidden], weighted by merging_probs [tokens, experts] if given."""
    assert map_type == "mask" and probs is None
    tokens, hidden = restore_shape if restore_shape is not None else inp.shape
    assert inp.size(1) == hidden and row_id_map.size(0) == tokens
    rows = inp
    if merging_probs is not None:
        rows = inp * merging_probs.T.reshape(-1)[row_id_map.T.reshape(-1) >= 0][:, None]
    return rows.new_zeros(tokens, hidden).index_add(0, _sources(row_id_map), rows)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """Return the chunks of the rows, of these sizes, in the order of the index."""
    parts = inp.split(split_sizes.tolist())
    return torch.cat([parts[index] for index in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rows and their probabilities [rows], sorted alike."""
    return tuple(moe_sort_chunks_by_index(x, split_sizes, sorted_index) for x in (inp, probs))  # type: ignore[return-value]
