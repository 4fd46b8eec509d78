"""This is the GPU platform: NCCL, Transformer Engine modules, fused kernels."""

import os
from typing import Any

import torch
from torch import Tensor


class GpuPlatform:
    """Uses CUDA with Transformer Engine (`pip install .[cuda]`)."""

    name = "gpu"
    backend = "nccl"

    def __init__(self) -> None:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"this machine has a GPU, but Transformer Engine cannot be imported ({error}); install the GPU "
                "requirements with `pip install .[cuda]`, or hide the GPU (CUDA_VISIBLE_DEVICES=) to run on CPU"
            ) from error
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(self.device)

    def transformer_options(self) -> dict[str, Any]:
        """Enable fused kernels that do not change the mathematics."""
        return {
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
            "apply_rope_fusion": True,
            "bias_activation_fusion": True,
            "masked_softmax_fusion": True,
            "bias_dropout_fusion": True,
        }

    def layer_spec(self, *, num_experts: int | None, qk_layernorm: bool, latent: bool) -> Any:
        """Return Megatron's Transformer Engine layer."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=num_experts is not None,
            qk_layernorm=qk_layernorm or latent,
            multi_latent_attention=latent,
        )

    def final_norm(self) -> Any:
        """Return Transformer Engine's norm."""
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm

    def packed_sequences(self, cu_seqlens: Tensor, max_seqlen: int, context_rank: int, context_size: int) -> Any:
        """Return the THD description of a row; Transformer Engine makes the context-parallel cut."""
        from megatron.core.packed_seq_params import PackedSeqParams

        cu_seqlens = cu_seqlens.to(self.device)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
