"""Transformer Engine's classes, computing in plain torch on a CPU.

Everything here is written from Transformer Engine's documentation and source (2.10 and 2.20), and imports nothing of
this project. Constructors, parameters, marks and state stay Transformer Engine's own; only what would start a kernel is
replaced: the forward of a class, a function of a module, a kernel of the extension. Where Transformer Engine refuses an
argument, so does this.
"""

from collections.abc import Callable
from typing import Any


def kernels() -> dict[str, Callable[..., Any]]:
    """Return the kernels of the extension that the optimizer and the gradient norm call, and the version of cuDNN, for
    which 2.10 asks when it builds an attention."""
    from tests.gpu_ready.te_emulation import optimizer

    return {**optimizer.KERNELS, "get_cudnn_version": lambda: 91401}


def emulate() -> None:
    """Replace what would start a kernel; call it before Megatron-Core is imported, which keeps references."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import permutation as te_permutation
    from transformer_engine.pytorch.attention import rope as te_rope

    from tests.gpu_ready.te_emulation import attention, linear, permutation, rope

    te.RMSNorm.forward = linear.rms_norm
    te.Linear.forward = linear.linear
    te.LayerNormLinear.forward = linear.layer_norm_linear
    te.GroupedLinear.forward = linear.grouped_linear
    te.DotProductAttention.forward = attention.dot_product_attention
    te_rope.apply_rotary_pos_emb = rope.unfused(te_rope.apply_rotary_pos_emb)
    for name in permutation.FUNCTIONS:
        setattr(te_permutation, name, getattr(permutation, name))


def emulate_megatron() -> None:
    """Replace the rotary embedding of latent attention, which is a Triton kernel of Megatron-Core itself."""
    from megatron.core.transformer import multi_latent_attention

    from tests.gpu_ready.te_emulation import rope

    multi_latent_attention.fused_apply_mla_rope_for_q = rope.latent_query
    multi_latent_attention.fused_apply_mla_rope_for_kv = rope.latent_key_value
