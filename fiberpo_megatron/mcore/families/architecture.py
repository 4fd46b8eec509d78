"""Defines the numbers that describe a model: a family reads them from config.json, the model and the planner use them.

This module imports neither torch nor Megatron.
"""

from dataclasses import dataclass
from typing import Literal

from fiberpo_megatron.mcore.families.rope import Rope


@dataclass(frozen=True)
class LatentAttention:
    """This is multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Sizes are those of one head unless the field says otherwise.
    """

    query_rank: int | None
    """Size of the compressed queries, over all heads; None when queries are projected directly."""
    key_value_rank: int
    """Size of the compressed keys and values, over all heads."""
    plain_size: int
    """Size of the part of queries and keys that has no rotary embedding."""
    rotary_size: int
    """Size of the part that has a rotary embedding; all heads share that of the keys."""
    value_size: int
    """Size of a value."""


@dataclass(frozen=True)
class Experts:
    """This is the mixture of experts of the layers that have one."""

    count: int
    """Number of experts among which the router chooses."""
    per_token: int
    """Number of experts that each token is sent to."""
    ffn_size: int
    """Inner size of one expert."""
    dense_layers: tuple[int, ...]
    """Layers, counted from 0, that have a plain MLP instead."""
    normalised: bool
    """Whether the probabilities of the chosen experts are scaled to sum to 1."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become probabilities."""
    shared_ffn_size: int = 0
    """Inner size of the experts that every token goes to, taken together; 0 when the model has none."""
    correction_bias: bool = False
    """Whether a bias is added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437, equation 16)."""
    scaling: float | None = None
    """Factor by which the probabilities of the chosen experts are multiplied; None for 1."""
    groups: int | None = None
    """Number of groups of experts of which a token may use only some; None when it may use any expert."""
    groups_per_token: int | None = None
    """Number of groups that a token may use; None when it may use any expert."""


@dataclass(frozen=True)
class Architecture:
    """This is a decoder with RMSNorm, rotary embeddings and SwiGLU, as the Megatron model is built from it.

    A checkpoint records every field, and a run resumes only from one whose fields are the same.
    """

    model_type: str
    """The family's name in config.json; it appears in messages only."""
    layers: int
    hidden_size: int
    ffn_size: int
    """Inner size of the MLP of a dense layer."""
    heads: int
    """Number of query heads."""
    key_value_heads: int
    head_dim: int
    """Size of one head's queries and keys."""
    vocab_size: int
    norm_eps: float
    """Epsilon of the RMSNorm layers."""
    rope: Rope
    tied_embeddings: bool
    """Whether the output layer uses the matrix of the embedding."""
    initializer_range: float
    """Standard deviation of randomly drawn matrices."""
    max_positions: int
    qk_norm: bool
    """Whether the queries and keys of each head pass an RMSNorm."""
    qkv_bias: bool
    """Whether the projections to queries, keys and values have a bias."""
    experts: Experts | None
    """None for a dense model."""
    latent: LatentAttention | None
    """None for grouped-query attention."""
    predict_layers: int
    """Number of multi-token prediction layers behind the model's own; their weights are neither loaded nor exported."""
