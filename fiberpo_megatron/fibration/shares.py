"""Multiply token values and node values with expert shares, in blocks of tokens that stay in cache.

A product with token values goes into a node's sum and is exact: values are cut into slices, and shares into parts, of
few enough bits (`add_products`). A product with node values goes to a token. It is rounded, one partition after the
other, so that its bits depend on the token's shares and its node's values alone (`handed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fiberpo_megatron.fibration.exact import SHARE_UNIT, Limbs, Prefixes
from fiberpo_megatron.fibration.runs import BLOCK, GPU_CHUNK, RunSlice
from fiberpo_megatron.fibration.slices import Cut, cut, float_slice_bits, rounded, slice_bits

COARSE_SHARE_UNIT = -23
"""Exponent of the unit of a share's larger part; the smaller part, at most half a unit, has that of `SHARE_UNIT`."""
SHARE_BITS = 25
"""Bits of either part, with its sign."""
SLOT_UNIT = -8
"""Exponent of the unit of shares that need no second part: those of 2, 4, 8, ... routed slots a token."""
SLOT_BITS = 9
"""Bits of such a share."""
CACHED = 1 << 16
"""Numbers of a temporary that stays in a core's cache beside two others."""


@dataclass(frozen=True)
class Shares:
    """Holds the membership kernel K of a rank's tokens."""

    share: Tensor
    """omega [N, P]."""
    soft: bool

    def kernel(self, tokens: slice) -> Tensor:
        """Return K(i, p) of a chunk, [n, P]: omega when soft, one-hot at its first maximum when hard."""
        share = self.share[tokens]
        if self.soft:
            return share
        return torch.zeros_like(share).scatter_(1, self._largest[tokens].unsqueeze(1), 1.0)

    def by_partition(self, tokens: slice) -> Tensor:
        """Return K(i, p) of a chunk, [P, n], with the tokens of a partition beside each other."""
        if self.soft:
            return self._transposed[:, tokens]
        largest = self._largest[tokens]
        return self.share.new_zeros(self.share.shape[1], largest.shape[0]).scatter_(0, largest.unsqueeze(0), 1.0)

    @cached_property
    def _transposed(self) -> Tensor:
        """omega [P, N], kept for all passes: a partition of many tokens is worked on faster than a token's few ones."""
        found = self.share.new_empty(self.share.shape[::-1])
        for columns, rows in zip(found.split(CACHED // 4, 1), self.share.split(CACHED // 4), strict=True):
            columns.copy_(rows.t())
        return found

    @cached_property
    def _largest(self) -> Tensor:
        """The partition of each token's first largest share, [N]: the lowest p wins a tie."""
        return self.share.argmax(dim=1)

    @cached_property
    def units(self) -> tuple[int, ...]:
        """Return the exponents of the units of the parts into which `parts` cuts K."""
        if not self.soft:
            return (0,)
        return (SLOT_UNIT,) if self._multiples_of(SLOT_UNIT) else (COARSE_SHARE_UNIT, SHARE_UNIT)

    @property
    def bits(self) -> int:
        """Return the bits of a part: of a multiple of its unit, with the sign."""
        return {0: 0, SLOT_UNIT: SLOT_BITS, COARSE_SHARE_UNIT: SHARE_BITS}[self.units[0]]

    def parts(self, kernel: Tensor) -> list[Tensor]:
        """Return the parts, one for each of the `units`, that add up to numbers of K, to a unit of 2^`SHARE_UNIT`."""
        if len(self.units) == 1:
            return [kernel]
        if self._needs_rounding:
            kernel = rounded(kernel.double(), SHARE_UNIT)
        coarse = (kernel + 1.0).sub_(1.0) if kernel.dtype == torch.float32 else rounded(kernel, COARSE_SHARE_UNIT)
        return [coarse, kernel - coarse]

    @cached_property
    def _needs_rounding(self) -> bool:
        """Whether a share is no multiple of 2^`SHARE_UNIT`. The shares of counts in float32 all are."""
        return not self._multiples_of(SHARE_UNIT)

    def _multiples_of(self, unit: int) -> bool:
        parts = self.share.split(GPU_CHUNK if self.share.is_cuda else CACHED // 4)
        return not any(float((part * 2.0**-unit).frac_().max()) for part in parts)


def handed(rows: Tensor, shares: Shares, tokens: slice, runs: RunSlice) -> Tensor:
    """Return the products [C, n] of each run's node values [r, C, P] with K(i, p) of its tokens."""
    found, kernel = rows.new_empty(rows.shape[1], runs.tokens), shares.kernel(tokens).to(rows.dtype)
    if not runs.long_on_cpu:
        _add_up(rows.index_select(0, runs.run_of_token).permute(2, 1, 0), kernel.t().unsqueeze(1), found)
        return found
    first, others, run_of_others = runs.blocks
    step = max(1, CACHED // (BLOCK * rows.shape[1]))
    values = rows.index_select(0, first).permute(2, 1, 0).unsqueeze(3).split(step, 2)
    by_partition = shares.by_partition(tokens).to(rows.dtype).unsqueeze(1)
    whole, out = (it[..., : first.shape[0] * BLOCK].unflatten(-1, (-1, BLOCK)) for it in (by_partition, found))
    for blocks in zip(values, whole.split(step, 2), out.split(step, 1), strict=True):
        _add_up(*blocks)
    of_others, alone = rows.index_select(0, run_of_others), rows.new_empty(rows.shape[1], others.shape[0])
    _add_up(of_others.permute(2, 1, 0), kernel.index_select(0, others).t().unsqueeze(1), alone)
    return found.index_copy_(1, others, alone)


def _add_up(values: Tensor, shares: Tensor, out: Tensor) -> None:
    """Write the sums of values times shares over their first dimension, rounded from the first to the last."""
    product = torch.empty_like(out, memory_format=torch.contiguous_format)
    # Products are rounded before they are added: an operation for both rounds once on one machine and twice on another.
    # The first product may take it, because to add zero rounds nothing; that makes 0.0 of -0.0.
    pairs = zip(values.unbind(0), shares.unbind(0), strict=True)
    out.zero_().addcmul_(*next(pairs))
    for value, share in pairs:
        out.add_(torch.mul(value, share, out=product))


def add_products(
    sums: Limbs, base: Tensor, values: Sequence[Tensor | None], shares: Shares, tokens: slice, runs: RunSlice
) -> None:
    """Add the sums over each run of token values [n] times K(i, p) to the entries `base` [r] of rows of [., P].

    None stands for ones. It notes values beyond their range.
    """
    if runs.long_on_cpu:
        bits = min(54 - BLOCK.bit_length(), slice_bits(runs.longest)) - shares.bits
        left, found = _sliced(sums, values, bits, runs)
        if found:
            _add_blocks(sums, base, left, found, shares, tokens, runs)
        return
    left, found = _sliced(sums, values, float_slice_bits(shares.share) - shares.bits, runs)
    for part in shares.parts(shares.kernel(tokens)):
        for values_of_slice, (row, _) in zip(left, found, strict=True):
            sums.add(row, base, runs.sums(part * values_of_slice[: runs.tokens].unsqueeze(1)))


def _add_blocks(
    sums: Limbs,
    base: Tensor,
    left: Tensor,
    found: Sequence[tuple[int, int]],
    shares: Shares,
    chunk: slice,
    runs: RunSlice,
) -> None:
    """Add sums over long runs.

    All blocks of tokens are multiplied at once, whatever runs they hold; then those in which a run ends, up to its end.
    A block's product is exact in float64, because its slices and shares have few enough bits.
    """
    count = left.shape[1] // BLOCK
    rows = left[:, : count * BLOCK].unflatten(1, (count, BLOCK)).transpose(0, 1)
    at, up_to_end = runs.last // BLOCK, torch.arange(BLOCK) <= (runs.last % BLOCK).view(-1, 1, 1)
    ends = rows.index_select(0, at).mul_(up_to_end.double())
    tokens = ((at * BLOCK).unsqueeze(1) + torch.arange(BLOCK)).clamp_(max=runs.tokens - 1).view(-1)
    parts = shares.parts(shares.kernel(chunk).index_select(0, tokens))
    whole = _products(rows, shares, shares.by_partition(chunk))
    for share_unit, blocks, part in zip(shares.units, whole, parts, strict=True):
        scale = torch.tensor([[2.0 ** -(unit + share_unit)] for _, unit in found], dtype=torch.float64)
        prefixes = blocks.mul_(scale).long().cumsum(0).index_select(0, at)
        prefixes += torch.bmm(ends, part.double().view(-1, BLOCK, part.shape[1])).mul_(scale).long()
        for place, (row, unit) in enumerate(found):
            sums.add_prefixes(row, Prefixes(base, prefixes[:, place], runs.lengths, 0, unit + share_unit))


def _sliced(
    sums: Limbs, values: Sequence[Tensor | None], bits: int, runs: RunSlice
) -> tuple[Tensor, list[tuple[int, int]]]:
    """All slices of token values, float64 [R, m], of whole blocks of tokens, and for each its row and its unit."""
    cuts: list[tuple[int, Cut | None]] = []
    for row, (value, it) in enumerate(zip(values, sums.ranges, strict=True)):
        if value is None:
            cuts.append((row, None))
        elif (found := cut(value, it.shared_unit, it.limit, bits)) is not None:
            cuts.append((row, found))
        else:
            sums.flag()
    places = [(row, unit) for row, own in cuts for unit in ((0,) if own is None else own.units)]
    # Rows of a matrix that are a power of two apart share cache lines, which makes products three times slower.
    tokens, device = runs.tokens, runs.lengths.device
    left = torch.empty(len(places), -(-tokens // BLOCK) * BLOCK + 8, dtype=torch.float64, device=device)
    left[:, tokens:] = 0.0
    first = 0
    for _, own in cuts:
        if own is None:
            left[first, :tokens] = 1.0
            first += 1
        else:
            own.write(left[first : first + len(own.units), :tokens])
            first += len(own.units)
    return left, places


def _products(rows: Tensor, shares: Shares, kernel: Tensor) -> list[Tensor]:
    """The products of blocks of slices, float64 [b, R, BLOCK], with each part of the shares [P, n].

    Those with one part are [1 + b, R, P], and begin with a block of zeros.
    """
    (blocks, height, _), partitions = rows.shape, kernel.shape[0]
    step = max(1, CACHED // (BLOCK * partitions))
    wide = torch.zeros(partitions, step * BLOCK + 8, dtype=torch.float64)
    right = wide[:, : step * BLOCK].view(partitions, step, BLOCK).permute(1, 2, 0)
    found = [torch.empty(1 + blocks, height, partitions, dtype=torch.float64) for _ in shares.units]
    for it in found:
        it[0] = 0.0
    outs = zip(*(it[1:].split(step) for it in found), strict=True)
    for part, left, out in zip(kernel.split(step * BLOCK, 1), rows.split(step), outs, strict=True):
        for numbers, into in zip(shares.parts(part), out, strict=True):
            wide[:, : part.shape[1]] = numbers
            torch.bmm(left, right[: left.shape[0]], out=into)  # beyond the last token, slices are zero
    return found
