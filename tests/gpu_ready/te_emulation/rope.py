"""Rotary embeddings: Transformer Engine's for packed rows, and Megatron-Core's Triton kernels of latent attention."""

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from tests.gpu_ready.te_emulation.attention import _positions

latent_calls: Counter[str] = Counter()
"""How often this process has called each kernel of latent attention. Without them Megatron-Core gives the same."""


def unfused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return Transformer Engine's `apply_rotary_pos_emb`, which takes its own path in torch whatever is asked for."""

    @wraps(function)
    def applied(t: Tensor, freqs: Tensor, *args: Any, fused: bool = False, **options: Any) -> Tensor:
        assert fused and options["tensor_format"] == "thd", "the project asks for the fused kernel over packed rows"
        assert freqs.dtype == torch.float32, "Dtype of the freqs tensor must be float32"
        return function(t, freqs, *args, **options)

    return applied


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, rank: int, size: int) -> Tensor:
    """Return [t, h, d] with pairs of neighbours rotated, halves apart, by the position inside the sequence."""
    lengths = bounds.diff().tolist()
    at = torch.cat([_positions(length, size, rank) for length in lengths])
    cos, sin = (angles.reshape(angles.size(0), 1, -1).index_select(0, at) for angles in (cos, sin))
    left, right = x[..., 0::2], x[..., 1::2]
    half = x.size(-1) // 2
    return torch.cat(
        [
            left * cos[..., :half] - right * sin[..., :half],
            right * cos[..., half:] + left * sin[..., half:],
        ],
        dim=-1,
    )


def latent_query(
    t: Tensor,
    cos: Tensor,
    sin: Tensor,
    plain: int,
    rotary: int,
    cu_seqlens_q: Tensor,
    cp_rank: int = 0,
    cp_size: int = 1,
    rotary_interleaved: bool = False,
) -> Tensor:
    """Return queries [t, h, plain + rotary] whose last elements are rotated."""
    latent_calls["query"] += 1
    assert not rotary_interleaved and t.size(-1) == plain + rotary
    bounds = cu_seqlens_q
    return torch.cat([t[..., :plain], _rotated(t[..., plain:], cos, sin, bounds, cp_rank, cp_size)], dim=-1)


def latent_key_value(
    kv: Tensor,
    k_pos_emb: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary: int,
    plain: int,
    v_size: int,
    cu_seqlens_kv: Tensor,
    cp_rank: int = 0,
    cp_size: int = 1,
    rotary_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return keys [t, h, plain + rotary], values [t, h, v] from kv [t, h, plain + v] and k_pos_emb [t, 1, rotary]."""
    latent_calls["key and value"] += 1
    assert not rotary_interleaved and kv.size(-1) == plain + v_size and k_pos_emb.size(-1) == rotary
    assert all(size & (size - 1) == 0 for size in (rotary, plain, v_size)), "arange's range must be a power of 2"
    turned = _rotated(k_pos_emb, cos, sin, cu_seqlens_kv, cp_rank, cp_size)
    key = torch.cat([kv[..., :plain], turned.expand(-1, kv.size(1), -1)], dim=-1)
    return key, kv[..., plain:]
