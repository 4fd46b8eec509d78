"""Lists the parameters that one rank holds: names and order as Megatron builds them, shapes as the layout cuts them.

Everything follows from the architecture that the model's family reads from config.json, so that a new family needs no
code here.
"""

from collections.abc import Iterator
from functools import cache
from math import prod
from typing import NamedTuple

from fiberpo_megatron.mcore.families import Architecture, Experts, LatentAttention
from fiberpo_megatron.mcore.parallel.checks import layers_per_chunk
from fiberpo_megatron.mcore.settings import ParallelConfig


class Weight(NamedTuple):
    """Describes one parameter of a rank."""

    name: str
    shape: tuple[int, ...]
    expert: bool = False
    """Whether its gradient is summed over the expert-data-parallel ranks instead of all data-parallel ranks."""
    router: bool = False
    """Whether it belongs to a router, which is frozen unless `model.train_router`."""
    shared_embedding: bool = False
    """Whether it is the one matrix of a tied embedding and output layer, which the first and the last stage hold."""

    @property
    def numel(self) -> int:
        """Return the number of its elements on this rank."""
        return prod(self.shape)


def vocabulary_rows(architecture: Architecture, parallel: ParallelConfig) -> int:
    """Return the rows of one rank's shard of embedding and output layer; the vocabulary is padded to equal shards."""
    return -(-architecture.vocab_size // parallel.tensor)


def stage_layers(architecture: Architecture, parallel: ParallelConfig, stage: int, chunk: int) -> range:
    """Return the layers of model chunk `chunk` on pipeline stage `stage`, counted from 0 over the whole model."""
    counts = layers_per_chunk(architecture.layers, parallel.pipeline * parallel.virtual_pipeline)
    place = chunk * parallel.pipeline + stage
    first = sum(counts[:place])
    return range(first, first + counts[place])


def chunk_weights(architecture: Architecture, parallel: ParallelConfig, stage: int, chunk: int) -> list[Weight]:
    """Return the parameters of one model chunk in the order of `named_parameters()`."""
    vocabulary = (vocabulary_rows(architecture, parallel), architecture.hidden_size)
    first = stage == 0 and chunk == 0
    last = stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1
    tied = architecture.tied_embeddings
    weights: list[Weight] = []
    if first:
        weights.append(Weight("embedding", vocabulary, shared_embedding=tied))
    for layer in stage_layers(architecture, parallel, stage, chunk):
        weights += _layer(architecture, parallel, layer)
    if last:
        weights.append(Weight("final_layernorm", (architecture.hidden_size,)))
        if not (tied and first):  # a single stage uses the embedding itself
            weights.append(Weight("output_layer", vocabulary, shared_embedding=tied))
    return weights


def experts_of(architecture: Architecture, layer: int) -> Experts | None:
    """Return the experts of a layer, or None when it has a plain MLP."""
    experts = architecture.experts
    return None if experts is None or layer in experts.dense_layers else experts


def _layer(architecture: Architecture, parallel: ParallelConfig, layer: int) -> Iterator[Weight]:
    hidden, prefix = architecture.hidden_size, f"layers.{layer}"
    yield Weight(f"{prefix}.input_layernorm", (hidden,))
    if architecture.latent is None:
        yield from _attention(architecture, parallel, prefix)
    else:
        yield from _latent_attention(architecture, architecture.latent, parallel, prefix)
    yield Weight(f"{prefix}.pre_mlp_layernorm", (hidden,))
    experts = experts_of(architecture, layer)
    if experts is None:
        yield from _gated_mlp(f"{prefix}.mlp", hidden, architecture.ffn_size // parallel.tensor)
        return
    yield Weight(f"{prefix}.router", (experts.count, hidden), router=True)
    for expert in range(experts.count // parallel.expert):
        name = f"{prefix}.experts.{expert}"
        yield from _gated_mlp(name, hidden, experts.ffn_size // parallel.expert_tensor, expert=True)
    if experts.shared_ffn_size:
        yield from _gated_mlp(f"{prefix}.shared_experts", hidden, experts.shared_ffn_size // parallel.tensor)


def _attention(architecture: Architecture, parallel: ParallelConfig, prefix: str) -> Iterator[Weight]:
    hidden, size, tensor = architecture.hidden_size, architecture.head_dim, parallel.tensor
    rows = (architecture.heads + 2 * architecture.key_value_heads) * size // tensor
    yield Weight(f"{prefix}.linear_proj", (hidden, architecture.heads * size // tensor))
    yield Weight(f"{prefix}.linear_qkv", (rows, hidden))
    if architecture.qkv_bias:
        yield Weight(f"{prefix}.linear_qkv.bias", (rows,))
    if architecture.qk_norm:
        yield Weight(f"{prefix}.q_layernorm", (size,))
        yield Weight(f"{prefix}.k_layernorm", (size,))


def _latent_attention(
    architecture: Architecture, latent: LatentAttention, parallel: ParallelConfig, prefix: str
) -> Iterator[Weight]:
    """Yield the weights of latent attention: every tensor-parallel rank holds whole down-projections, and its heads'
    part of the up-projections."""
    hidden, heads = architecture.hidden_size, architecture.heads // parallel.tensor
    queries, rank = heads * architecture.head_dim, latent.key_value_rank
    yield Weight(f"{prefix}.linear_proj", (hidden, heads * latent.value_size))
    if latent.query_rank is None:
        yield Weight(f"{prefix}.linear_q_proj", (queries, hidden))
    else:
        yield Weight(f"{prefix}.linear_q_down_proj", (latent.query_rank, hidden))
        yield Weight(f"{prefix}.linear_q_up_proj", (queries, latent.query_rank))
    yield Weight(f"{prefix}.linear_kv_down_proj", (rank + latent.rotary_size, hidden))
    yield Weight(f"{prefix}.linear_kv_up_proj", (heads * (latent.plain_size + latent.value_size), rank))
    if latent.query_rank is not None:
        yield Weight(f"{prefix}.q_layernorm", (latent.query_rank,))
    yield Weight(f"{prefix}.kv_layernorm", (rank,))


def _gated_mlp(name: str, hidden: int, ffn: int, expert: bool = False) -> Iterator[Weight]:
    yield Weight(f"{name}.linear_fc1", (2 * ffn, hidden), expert)
    yield Weight(f"{name}.linear_fc2", (hidden, ffn), expert)


@cache
def model_parameters(architecture: Architecture) -> int:
    """Return the number of parameters of the whole model without padding; tied embeddings count once."""
    return sum(weight.numel for weight in chunk_weights(architecture, ParallelConfig(), 0, 0))


@cache
def active_parameters(architecture: Architecture) -> int:
    """Return the number of parameters that one token is multiplied with.

    These are all but the embedding table and the experts that the token is not sent to.
    """
    embedding = 0 if architecture.tied_embeddings else architecture.vocab_size * architecture.hidden_size
    experts = architecture.experts
    used = experts.per_token / experts.count if experts else 1.0
    return model_parameters(architecture) - embedding - round(expert_parameters(architecture) * (1 - used))


@cache
def expert_parameters(architecture: Architecture) -> int:
    """Return the number of parameters of the experts among which the routers choose."""
    return sum(weight.numel for weight in chunk_weights(architecture, ParallelConfig(), 0, 0) if weight.expert)
