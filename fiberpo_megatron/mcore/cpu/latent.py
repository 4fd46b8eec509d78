"""This module computes multi-head latent attention over the CPU platform's packed rows."""

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from fiberpo_megatron.mcore.cpu.packed import PackedRow


class PackedLatentAttention(MLASelfAttention):
    """Adapts Megatron's module, which looks up rotary angles by position inside a sequence only for rows in THD
    form."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return query and key [t, heads, plain + rotary size], value [t, heads, value size], and the compressed
        ones."""
        assert packed_seq_params is not None, "the CPU platform computes packed rows only"
        return super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params.thd, **kwargs
        )
