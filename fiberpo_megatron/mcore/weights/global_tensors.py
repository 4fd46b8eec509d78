"""Finds local parameters and gradients as parts of global tensors, which do not depend on the layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule


def global_shards(chunks: Sequence[MegatronModule]) -> Iterator[ShardedTensor]:
    """Yield every local parameter with its place in the global tensor, in pieces where a checkpoint stores pieces.

    The `data` of a piece shares memory with the parameter.
    """
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for value in nested_values(state):
            if isinstance(value, ShardedTensor):
                yield value


def gradient_shards(chunks: Sequence[MegatronModule]) -> Iterator[ShardedTensor]:
    """Yield what `global_shards` does for the gradients in the data-parallel buffers; frozen parameters have zeros."""
    with gradients_as_data(chunks):
        yield from global_shards(chunks)


@contextmanager
def gradients_as_data(chunks: Sequence[MegatronModule]) -> Iterator[None]:
    """Let parameters hold their gradients (zeros where frozen) inside the context, in the gradient buffers' type."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            gradient = getattr(parameter, "main_grad", None)
            parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
        yield
    finally:
        for parameter, data in zip(parameters, kept):
            parameter.data = data
