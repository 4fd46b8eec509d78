"""This package stands in for SGLang's compiled CPU kernels, of which no wheel is published.

SGLang imports the package on every platform. One kernel is used on the paths that this project takes: the hash behind
seeded sampling; it is written here in NumPy. Any other kernel raises when it is called.
"""

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

__version__ = "0.4.10"
__path__: list[str] = []

_OPS = torch.library.Library("sgl_kernel", "FRAGMENT")
_OPS.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")


def _rotate_left(x: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _mix(h: NDArray[np.uint32], k: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Hash one 4-byte block as MurmurHash3 x86_32 does; uint32 arrays wrap around."""
    k = _rotate_left(k * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate_left(h ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _finish(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """uint32 [n, m] MurmurHash3 of (64-bit seed, 32-bit position, 32-bit column); seed, positions [n], columns [m].

    Same blocks and order as SGLang's Triton kernel (sglang/kernels/ops/sampling/murmur_hash.py).
    """
    seeds = seed.view(torch.int64).numpy().view(np.uint64)
    h = np.zeros(len(seeds), dtype=np.uint32)
    for block in (seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32), positions.numpy()):
        h = _mix(h, block.astype(np.uint32))
    h = _mix(h[:, None], col_indices.numpy().astype(np.uint32)[None, :])
    return torch.from_numpy(_finish(h ^ np.uint32(16)))


_OPS.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not in the CPU stand-in (see sglang_cpu/README.md)")

    missing.__name__ = name
    return missing
