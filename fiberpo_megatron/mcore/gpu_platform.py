"""This is the GPU platform: NCCL, Transformer Engine modules, fused kernels."""

import os
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.mcore.cudnn import cudnn_folders, cudnn_versions, one_cudnn
from fiberpo_megatron.mcore.versions import set_grouped_layers
from fiberpo_megatron.mcore.weight_gradient import fused_kernel


class GpuPlatform:
    """Uses CUDA with Transformer Engine (README.md, "On GPUs")."""

    name = "gpu"
    backend = "nccl"

    def __init__(self) -> None:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"this machine has a GPU, but Transformer Engine cannot be imported ({error}); install it as "
                'README.md says under "On GPUs", or hide the GPU (CUDA_VISIBLE_DEVICES=) to run on CPU'
            ) from error
        versions = cudnn_versions()
        if versions.differ:
            raise ValueError(
                f"two versions of cuDNN are in one process ({versions}; loaded from {', '.join(cudnn_folders())}): "
                "Transformer Engine then falls back to an attention that holds the whole matrix of scores, and has "
                f"none under context parallelism; {one_cudnn()}"
            )
        # SLURM may show every rank of a machine one GPU, which then has number 0
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(self.device)

    def transformer_options(self) -> dict[str, Any]:
        """Enable fused kernels that do not change the mathematics."""
        return {
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
            # Linear layers add weight gradients to the main gradients inside the product. Transformer Engine's could
            # without apex, but Megatron refuses the output layer without it.
            "gradient_accumulation_fusion": fused_kernel() is not None,
            "apply_rope_fusion": True,
            "bias_activation_fusion": True,
            "masked_softmax_fusion": True,
            "bias_dropout_fusion": True,
        }

    def layer_spec(self, *, num_experts: int | None, qk_layernorm: bool, latent: bool) -> Any:
        """Return Megatron's Transformer Engine layer."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=num_experts is not None,
            qk_layernorm=qk_layernorm or latent,
            multi_latent_attention=latent,
        )
        if num_experts is not None:
            set_grouped_layers(spec)
        return spec

    def final_norm(self) -> Any:
        """Return Transformer Engine's norm."""
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm

    def packed_sequences(self, cu_seqlens: Tensor, max_seqlen: int, context_rank: int, context_size: int) -> Any:
        """Return the THD description of a row; Transformer Engine makes the context-parallel cut.

        Padding belongs to the sequence before it, so that none lies between sequences. Transformer Engine up to 2.15
        compares a second list of bounds on the device and waits for the answer, twice a layer: it gets one under
        context parallelism alone, where it demands one.
        """
        from megatron.core.packed_seq_params import PackedSeqParams

        cu_seqlens = cu_seqlens.to(self.device)
        padded = cu_seqlens if context_size > 1 else None
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
