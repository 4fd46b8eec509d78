"""Count log ratios in a fixed histogram that ranks can add up: quantiles and the maximum without gathering tokens.

Bins are the leading bits of the float32 pattern of |x|: 32 per octave from 2**-14 to 2**7, mirrored for the
sign, with one bin for |x| < 2**-14. A bin's width is at most 1/32 of |x|.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANTISSA_BITS = 5
SHIFT = 23 - _MANTISSA_BITS
LOWEST = (127 - 14) << _MANTISSA_BITS
PER_SIGN = 21 << _MANTISSA_BITS
BINS = 2 * PER_SIGN + 1
"""A bin is min(max((pattern of |x| >> SHIFT) - LOWEST + 1, 0), PER_SIGN), mirrored around PER_SIGN."""
FINE_BITS = 10
FINE_BINS = 1 << FINE_BITS
"""Sub-bins of one bin, with which the second reduction resolves the maximum to 2**-15 of |x|."""


def histogram(log_ratio: Tensor) -> Tensor:
    """Return the counts per bin, int64 [BINS]; log_ratio must be within +-2**7."""
    return torch.bincount(_bin(log_ratio), minlength=BINS)


def quantile(counts: Tensor, share: float) -> float:
    """Return the log ratio below which `share` of the tokens lie, to the middle of its bin; 0 without tokens."""
    total = counts.sum()
    if float(total) == 0.0:
        return 0.0
    at = int(torch.searchsorted(counts.cumsum(0), (share * total).reshape(1)).clamp(max=BINS - 1))
    return _edge_middle(at - PER_SIGN, 0, 0)


def top_bin(counts: Tensor) -> int:
    """Return the highest bin that holds a token; -1 without tokens."""
    held = counts.nonzero()
    return int(held[-1]) if held.numel() else -1


def fine_position(maximum: float, top: int) -> Tensor:
    """Return the one-hot [FINE_BINS] of this rank's maximum inside the global top bin; zeros when it lies below."""
    row = torch.zeros(FINE_BINS, dtype=torch.float64)
    if top < 0 or maximum == float("-inf"):
        return row
    value = torch.tensor([maximum], dtype=torch.float32)
    if int(_bin(value)) == top:
        row[(int(value.view(torch.int32)) >> (SHIFT - FINE_BITS)) & (FINE_BINS - 1)] = 1.0
    return row


def refined_maximum(top: int, fine: Tensor) -> float:
    """Return the global maximum from the top bin and the summed one-hots of `fine_position`."""
    if top < 0:
        return 0.0
    held = fine.nonzero().squeeze(1)
    signed = top - PER_SIGN
    if signed == 0:
        return 0.0
    best = int(held.max() if signed > 0 else held.min())  # a negative maximum is the smallest magnitude
    return _edge_middle(signed, best, FINE_BITS)


def _bin(log_ratio: Tensor) -> Tensor:
    bits = log_ratio.float().view(torch.int32)
    magnitude = ((bits & 0x7FFFFFFF) >> SHIFT).sub_(LOWEST - 1).clamp_(0, PER_SIGN)
    sign = bits >> 31  # 0 or -1: xor and subtract negate where it is -1
    return magnitude.bitwise_xor_(sign).sub_(sign).add_(PER_SIGN)


def _edge_middle(signed: int, fine: int, fine_bits: int) -> float:
    if signed == 0:
        return 0.0
    step = 1 << (SHIFT - fine_bits)
    low = ((abs(signed) + LOWEST - 1) << SHIFT) + fine * step
    edges = torch.tensor([low, low + step], dtype=torch.int32).view(torch.float32).double()
    return float(edges.mean()) * (1.0 if signed > 0 else -1.0)
