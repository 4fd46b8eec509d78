"""Finds local parameters and gradients as parts of global tensors, which do not depend on the layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule
from torch.nn import Parameter


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
    """Let parameters of the same names hold the gradients (zeros where frozen) inside the context, in the gradient
    buffers' type.

    The modules get other parameters, and their own back at the end. Data of another type in their own would make torch
    drop the hooks with which data parallelism adds to the gradient buffers.
    """
    owners = list(dict.fromkeys(module for chunk in chunks for module in chunk.modules()))
    kept = [dict(module._parameters) for module in owners]
    held: dict[Parameter, Parameter] = {}  # a tied parameter is one parameter inside the context too
    try:
        for module, own in zip(owners, kept):
            for name, parameter in own.items():
                if parameter is not None:
                    held.setdefault(parameter, _gradient_of(parameter))
                    module._parameters[name] = held[parameter]
        yield
    finally:
        for module, own in zip(owners, kept):
            module._parameters.update(own)


def _gradient_of(parameter: Parameter) -> Parameter:
    """Return a parameter with the same marks that shares memory with the gradient of this one."""
    gradient = getattr(parameter, "main_grad", None)
    held = Parameter(torch.zeros_like(parameter) if gradient is None else gradient, requires_grad=False)
    held.__dict__.update(parameter.__dict__)
    return held
