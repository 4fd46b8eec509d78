"""Megatron-Core's Triton kernels of latent attention beside their emulation, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.gpu_ready.te_kernels     # prints the largest difference
"""

import sys

import torch

from tests.gpu_ready.te_emulation import rope
from tests.gpu_ready.te_stub import TRITON


def main() -> None:
    """Print the largest difference over rows of three sequences, whole and cut for two context-parallel ranks."""
    sys.path.append(str(TRITON))
    from fiberpo_megatron.mcore.platform import activate

    activate()
    from megatron.core.fusions import fused_mla_yarn_rope_apply as kernels

    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]  # nothing to choose from, and so nothing to time
    torch.manual_seed(0)
    bounds = torch.tensor([0, 8, 32, 40], dtype=torch.int32)
    cos, sin = torch.randn(24, 1, 1, 4), torch.randn(24, 1, 1, 4)
    worst = 0.0
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        q, kv, k = torch.randn(40 // size, 2, 12), torch.randn(40 // size, 2, 16), torch.randn(40 // size, 1, 4)
        query = kernels.fused_apply_mla_rope_for_q(q.clone(), cos, sin, 8, 4, bounds, rank, size)
        both = kernels.fused_apply_mla_rope_for_kv(kv.clone(), k.clone(), cos, sin, 4, 8, 8, bounds, rank, size)
        wanted = rope.latent_query(q, cos, sin, 8, 4, bounds, rank, size)
        wanted_both = rope.latent_key_value(kv, k, cos, sin, 4, 8, 8, bounds, rank, size)
        for found, expected in zip((query, *both), (wanted, *wanted_both), strict=True):
            assert found.shape == expected.shape and found.abs().max() > 1
            worst = max(worst, float((found - expected).abs().max()))
    print(worst)


if __name__ == "__main__":
    main()
