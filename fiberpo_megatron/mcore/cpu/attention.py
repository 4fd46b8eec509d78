"""This is the core attention of the CPU platform: packed rows, grouped queries, context parallelism.

Megatron's DotProductAttention supports neither packed rows nor context parallelism; this module replaces it in the
layer spec. Sequences of similar length are batched, so that the cost is that of the sequences and not of the whole row
squared. Context-parallel ranks hold Megatron's zigzag chunks; keys and values are all-gathered (backward:
reduce-scatter).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from fiberpo_megatron.mcore.cpu.packed import PackedRow


class PackedAttention(MegatronModule):
    """Computes causal attention inside each sequence of a packed row; it has no parameters."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self.context_group = groups.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """Compute [t, 1, heads * v] from query [t, 1, heads, d], key [t, 1, groups, d] and value [t, 1, groups, v].

        Latent attention leaves out the dimension of 1.
        """
        assert packed_seq_params is not None, "the CPU platform computes packed rows only"
        query, key, value = (x if x.dim() == 3 else x.squeeze(1) for x in (query, key, value))
        if self.context_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.context_group)
            value = gather_from_sequence_parallel_region(value, group=self.context_group)
        buckets, place = packed_seq_params.layout
        outs = []
        for bucket in buckets:
            q = _batch(query, bucket.queries, bucket.sequences)
            k = _batch(key, bucket.keys, bucket.sequences)
            v = _batch(value, bucket.keys, bucket.sequences)
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bucket.mask,
                is_causal=bucket.mask is None,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))  # [S * q, heads, d]
        joined = torch.cat(outs) if len(outs) > 1 else outs[0]
        return joined.index_select(0, place).flatten(1).unsqueeze(1)


def _batch(x: Tensor, rows: Tensor, sequences: int) -> Tensor:
    """Map [t, heads, d] to [sequences, heads, length, d]."""
    picked = x.index_select(0, rows)
    return picked.view(sequences, -1, *picked.shape[1:]).transpose(1, 2)
