"""This module implements the platform's interface for the CPU."""

from typing import Any

import torch
from torch import Tensor


class CpuPlatform:
    """Uses gloo, Megatron's local modules with this package's core attention and norm, and torch's AdamW."""

    name = "cpu"
    backend = "gloo"
    device = torch.device("cpu")

    def transformer_options(self) -> dict[str, Any]:
        """Switch every fusion off, because all fused kernels are CUDA code."""
        return {
            "moe_grouped_gemm": False,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
        }

    def layer_spec(self, *, num_experts: int | None, qk_layernorm: bool, latent: bool) -> Any:
        """Return Megatron's local layer, with core attention and norms of `cpu/`."""
        from fiberpo_megatron.mcore.cpu.spec import layer_spec

        return layer_spec(num_experts=num_experts, qk_layernorm=qk_layernorm, latent=latent)

    def final_norm(self) -> Any:
        """Return a torch.nn.RMSNorm with the sequence-parallel mark."""
        from fiberpo_megatron.mcore.cpu.norm import RmsNorm

        return RmsNorm

    def packed_sequences(self, cu_seqlens: Tensor, max_seqlen: int, context_rank: int, context_size: int) -> Any:
        """Describe a packed row for `cpu/attention.py`."""
        from fiberpo_megatron.mcore.cpu.packed import PackedRow

        return PackedRow(cu_seqlens, max_seqlen, context_rank, context_size)
