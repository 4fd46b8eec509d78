"""This module counts the floating-point operations of a model: those that its mathematics needs, however it is run.

The count is that of PaLM (arXiv:2204.02311, appendix B) and of Megatron-LM: two operations for each parameter that a
token is multiplied with, and attention besides. Of experts only those count that a token is sent to. Attention counts
as it is run, causally: a token meets the tokens before it. (PaLM counts all pairs, which is up to twice as much.) A
backward pass has twice the operations of the forward pass. What is computed again to save memory earns nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.planning.shapes import ModelShape

TRAINING = 3
"""Operations of a forward and a backward pass over those of the forward pass."""


Lengths = Sequence[float] | NDArray[np.integer]
"""Tokens of each sequence."""


def forward_operations(shape: ModelShape, lengths: Lengths) -> float:
    """Return the operations of one forward pass over sequences of `lengths` tokens, the output layer included.

    Looking up embeddings, norms and the softmax are left out: they are no matrix products.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    pairs = shape.attention_layers * shape.heads * (shape.query_size + shape.value_size)
    return float(2 * shape.active * tokens.sum() + pairs * (tokens * tokens).sum())


def sampling_operations(shape: ModelShape, prompts: Lengths, lengths: Lengths, samples: float) -> float:
    """Return the operations of sampling: the forward pass over each response, and over each prompt once for its
    `samples` responses.

    `prompts` and `lengths` are the tokens of each trajectory's prompt, and of all of it.
    """
    read = forward_operations(shape, prompts)
    return forward_operations(shape, lengths) - read * (1 - 1 / max(1.0, samples))
