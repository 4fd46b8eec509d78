"""Which attention backend Transformer Engine chooses, asked of its own code with a GPU and cuDNN that are made up."""

from dataclasses import dataclass, fields
from typing import Any

import torch

CUDNN = (9, 14, 1)
"""A cuDNN that torch for CUDA 13 brings; neither package of flash-attention is installed."""


@dataclass(frozen=True)
class Attention:
    """Holds what the choice depends on, for packed rows without padding between sequences."""

    heads: int
    groups: int
    """Key-value heads of this rank."""
    size: int = 128
    """Elements of a query and a key."""
    value_size: int = 128
    dtype: str = "bfloat16"
    context: int = 1
    capability: tuple[int, int] = (9, 0)
    padded: bool = False
    """Whether there is padding between sequences."""


def choose(asked: list[Attention]) -> list[str]:
    """Return "flash", "fused", "unfused" or "none" for each, in the process that `te_ranks.prepare` prepared."""
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    found = []
    for one in asked:
        utils.get_device_compute_capability = lambda capability=one.capability: capability
        utils.get_cudnn_version = lambda: CUDNN
        extension.get_fused_attn_backend = _extension(utils, one.capability)
        flash, _, fused, _, unfused = utils.get_attention_backend(_params(utils, one))[:5]
        found.append("flash" if flash else "fused" if fused else "unfused" if unfused else "none")
    return found


def _params(utils: Any, one: Attention) -> Any:
    rows = 4096
    values = {
        "qkv_dtype": getattr(torch, one.dtype),
        "nominal_dtype": getattr(torch, one.dtype),
        "qkv_layout": "thd_thd_thd",
        "batch_size": 4,
        "num_heads": one.heads,
        "num_gqa_groups": one.groups,
        "max_seqlen_q": rows // 2,
        "max_seqlen_kv": rows // 2,
        "num_tokens_q": rows // one.context,
        "num_tokens_kv": rows // one.context,
        "head_dim_qk": one.size,
        "head_dim_v": one.value_size,
        "attn_mask_type": "padding_causal",
        "window_size": (-1, 0),
        "pad_between_seqs": one.padded,
        "context_parallel": one.context > 1,
        "cp_comm_type": "p2p",
        "cp_size": one.context,
        "is_training": True,
        "softmax_scale": one.size**-0.5,
    }
    known = {field.name for field in fields(utils.AttentionParams)}
    return utils.AttentionParams(**{name: value for name, value in values.items() if name in known})


def _extension(utils: Any, capability: tuple[int, int]) -> Any:
    """Return the extension's part of the choice (`nvte_get_fused_attn_backend`), as far as it concerns packed rows in
    training with a causal mask, with cuDNN 9.11 or later."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    def get(*arguments: Any) -> Any:
        if len(arguments) == 1:  # since 2.20 one object, and an explanation beside the answer
            (params,) = arguments
            dtype, sizes = params.qkv_dtype, (params.head_dim_qk, params.head_dim_v)
        else:
            dtype, sizes = arguments[1], arguments[12:14]
        architecture = 10 * capability[0] + capability[1]
        narrow = dtype in (TE_DType[torch.bfloat16], TE_DType[torch.float16])
        fits = all(size % 8 == 0 for size in sizes) and (
            max(sizes) <= 128
            or (architecture == 90 and max(sizes) <= 256 and (sizes[0] == sizes[1] or sizes == (192, 128)))
            or (architecture >= 100 and sizes == (192, 128))
        )
        name = "F16_arbitrary_seqlen" if narrow and fits and architecture >= 90 else "No_Backend"
        answer = FusedAttnBackend[name]
        return (answer, "made up") if len(arguments) == 1 else answer

    return get
