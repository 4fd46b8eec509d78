"""Check the flat token tensors that an objective is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to +-20 (exp(20) = 4.9e8), unless an objective sets `Rule.max_log_ratio`; the gradient beyond
is zero."""
WIDEST_LOG_RATIO = 80.0
"""The largest clamp that an objective may set: exp(80) = 5.5e34, and a thousand times that, is finite in float32."""

SHARE_TOLERANCE = 1e-4
"""How far a token's expert shares may sum from 1 (float32 counts are within 1e-6)."""

LONE = -1
"""Id of a token that is alone in its node, for objectives with `lone_nodes`."""

MIN_TABLE_SIZE = 1024
"""Smallest node table per key when ranks must agree on its size without knowing `counts`."""


@dataclass(frozen=True)
class TokenBatch:
    """Holds this rank's response tokens; all tensors are [N] unless said otherwise."""

    log_ratio: Tensor
    advantages: Tensor
    weights: Tensor
    ids: dict[str, Tensor]
    counts: Mapping[str, int] | None
    expert_share: Tensor | None
    """[N, P], rows sum to 1."""
    labels: Mapping[str, Tensor]
    """Per key, the number that each id has in budgets and branches, int64 [counts[key]]; without it, that is the id."""
    old_log_probs: Tensor | None = None
    """log pi_old; None unless the objective reads it."""
    lone_key: str | None = None
    """The key whose last id, one more than the caller's, stands for the caller's -1."""

    @property
    def size(self) -> int:
        return self.log_ratio.shape[0]

    @property
    def partitions(self) -> int:
        return 1 if self.expert_share is None else self.expert_share.shape[1]


@dataclass(frozen=True)
class ValueRanges:
    """Holds what a look at all values has shown."""

    any_weightless: bool
    any_beyond_clamp: bool
    max_log_ratio: float
    """Largest clamped log ratio on this rank of a token whose weight is not 0; -inf when it holds none."""


def make_batch(
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    keys: Mapping[str, Tensor],
    counts: Mapping[str, int] | None,
    expert_share: Tensor | None,
    labels: Mapping[str, Tensor],
    old_log_probs: Tensor | None = None,
) -> TokenBatch:
    """Return a batch with checked shapes and types; `keys`, `labels`, `expert_share` and `old_log_probs` hold only what
    the objective reads."""
    if log_ratio.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_ratio is {log_ratio.dtype}; cast it to float32 or float64")
    if log_ratio.dim() != 1:
        raise ValueError(f"log_ratio has shape {tuple(log_ratio.shape)}; flatten it to [N] response tokens")
    log_ratio = log_ratio.detach()
    return TokenBatch(
        log_ratio=log_ratio,
        advantages=_like("advantages", advantages, log_ratio),
        weights=_like("weights", weights, log_ratio),
        ids={name: _check_ids(name, ids, log_ratio) for name, ids in keys.items()},
        counts=counts,
        expert_share=None if expert_share is None else _shaped_share(expert_share, log_ratio),
        labels={name: _check_labels(name, label, counts) for name, label in labels.items()},
        old_log_probs=None if old_log_probs is None else _like("old_log_probs", old_log_probs, log_ratio),
    )


def check_values(batch: TokenBatch, limit: float) -> ValueRanges:
    """Refuse non-finite values, negative weights and shares that do not sum to 1; waits for the device.

    Log ratios are clamped to +-`limit`.
    """
    low, high = _finite_range("log_ratio", batch.log_ratio)
    _finite_range("advantages", batch.advantages)
    if batch.old_log_probs is not None:
        _finite_range("old_log_probs", batch.old_log_probs)
    smallest, _ = _finite_range("weights", batch.weights)
    if smallest < 0.0:
        at = int(batch.weights.argmin())
        raise ValueError(f"weights[{at}] is {smallest}; an objective's token weights must not be negative")
    if batch.expert_share is not None and batch.expert_share.numel():
        _check_share(batch.expert_share)
    return ValueRanges(
        any_weightless=smallest == 0.0,
        any_beyond_clamp=low < -limit or high > limit,
        max_log_ratio=_largest_counted(batch, smallest, high, limit),
    )


def _largest_counted(batch: TokenBatch, smallest: float, high: float, limit: float) -> float:
    if smallest == 0.0:
        high = float(batch.log_ratio.masked_fill(batch.weights == 0.0, float("-inf")).max()) if batch.size else high
    return min(max(high, -limit), limit) if batch.size and high > float("-inf") else float("-inf")


def table_size(name: str, largest: int, counts: Mapping[str, int] | None, *, shared: bool) -> int:
    """Return the number of ids of one key, the same on every rank.

    With `counts` it is the caller's global number. Without, it is largest + 1 on a single rank; when
    tables are `shared` between ranks it is padded to a power of two of at least MIN_TABLE_SIZE, which
    agrees on all ranks as long as their largest ids round to the same size: pass `counts` otherwise.
    """
    if counts is not None:
        if name not in counts:
            raise ValueError(f"counts lacks key {name!r}; add its global number of ids (got {sorted(counts)})")
        return int(counts[name])
    if not shared:
        return max(1, largest + 1)
    return int(max(MIN_TABLE_SIZE, 1 << max(0, largest).bit_length()))


def with_lone_node(batch: TokenBatch, key: str, *, shared: bool) -> TokenBatch:
    """Return the batch with one more id of `key`, which the tokens of id -1 get.

    Other ids below 0 or from counts[key] on stay out of range, so that the check of ids refuses them.
    """
    counts = batch.counts
    if counts is None:
        largest = {name: int(ids.max()) if batch.size else -1 for name, ids in batch.ids.items()}
        counts = {name: table_size(name, largest[name], None, shared=shared) for name in batch.ids}
    size = table_size(key, 0, counts, shared=shared)
    ids = batch.ids[key].long()
    ids = torch.where(ids == LONE, size, ids + (ids >= size))
    return replace(batch, ids={**batch.ids, key: ids}, counts={**counts, key: size + 1}, lone_key=key)


def require_keys(keys: Mapping[str, Tensor] | None, names: Sequence[str], objective: str) -> dict[str, Tensor]:
    """Return the tensors of the keys that an objective reads; ValueError when one is missing."""
    given = keys or {}
    for name in names:
        if name not in given:
            raise ValueError(f"objective {objective!r} reads key {name!r}: pass keys[{name!r}] (got {sorted(given)})")
    return {name: given[name] for name in names}


def _like(name: str, value: Tensor, log_ratio: Tensor) -> Tensor:
    if value.shape != log_ratio.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but log_ratio has {tuple(log_ratio.shape)}; "
            "both must be flat over the same response tokens"
        )
    return value.detach().to(dtype=log_ratio.dtype, device=log_ratio.device)


def _finite_range(name: str, value: Tensor) -> tuple[float, float]:
    """(min, max); one pass, because aminmax hands NaN through."""
    if value.numel() == 0:
        return 0.0, 0.0
    low, high = (float(end) for end in torch.aminmax(value))
    if not (float("-inf") < low and high < float("inf")):
        at = int((~torch.isfinite(value)).nonzero()[0])
        raise ValueError(f"{name}[{at}] is {float(value[at])}; every response token needs a finite value")
    return low, high


def _check_ids(name: str, ids: Tensor, log_ratio: Tensor) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"keys[{name!r}] is {ids.dtype}; ids must be int64 or int32")
    if ids.shape != log_ratio.shape:
        raise ValueError(
            f"keys[{name!r}] has shape {tuple(ids.shape)}; it needs one id per token, {log_ratio.shape[0]}"
        )
    if ids.device != log_ratio.device:
        raise ValueError(f"keys[{name!r}] is on {ids.device} but log_ratio is on {log_ratio.device}; move one of them")
    return ids


def _check_labels(name: str, label: Tensor, counts: Mapping[str, int] | None) -> Tensor:
    if label.dtype != torch.int64 or label.dim() != 1:
        raise ValueError(f"labels[{name!r}] is {label.dtype} {list(label.shape)}; it needs one int64 number per id")
    if counts is not None and name in counts and label.shape[0] != counts[name]:
        raise ValueError(f"labels[{name!r}] has {label.shape[0]} numbers, but counts[{name!r}] is {counts[name]}")
    return label


def _shaped_share(share: Tensor, log_ratio: Tensor) -> Tensor:
    if share.dim() != 2 or share.shape[0] != log_ratio.shape[0] or share.shape[1] < 1:
        raise ValueError(
            f"expert_share has shape {tuple(share.shape)}; it must be [N, P] with N = {log_ratio.shape[0]} "
            "tokens and P >= 1 partitions (also [0, P] on a rank without tokens)"
        )
    return share.detach().to(dtype=log_ratio.dtype, device=log_ratio.device)


def _check_share(share: Tensor) -> None:
    low, _ = _finite_range("expert_share.flatten()", share.reshape(-1))
    if low < 0.0:
        at = int(share.argmin()) // share.shape[1]
        raise ValueError(f"expert_share[{at}] holds {low}; a share of routed slots must not be negative")
    error = (share @ share.new_ones(share.shape[1])).sub_(1.0).abs_()
    if error.numel() and float(error.max()) > SHARE_TOLERANCE:
        worst = int(error.argmax())
        raise ValueError(
            f"level key 'expert': expert_share[{worst}] sums to {float(share[worst].sum())}, not 1; divide "
            "each token's counts by their sum in float32"
        )
