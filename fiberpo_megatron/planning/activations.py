"""This module counts the bytes that autograd keeps of one micro-batch between its forward and backward pass on one
rank.

There are two layer implementations. `local` is the CPU platform's layer (Megatron's local modules, `mcore/cpu`); every
term names the tensors that were seen with saved-tensor hooks, and tests/planning/test_activations.py checks that the
sum is right to 15 %. `te` is the GPU platform's layer (Transformer Engine, flash attention, grouped experts); it is
derived from what those modules hand to their backward functions, and was not measured.
"""

from dataclasses import dataclass
from typing import Literal

from fiberpo_megatron.mcore.families import Architecture, Experts, LatentAttention
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.planning.parameters import experts_of, stage_layers, vocabulary_rows
from fiberpo_megatron.planning.states import DTYPE_BYTES

Implementation = Literal["local", "te"]

SLICE_BYTES = 64 * 2**20
"""Bytes of the product that is added to the output layer's main gradient at a time, where their types differ; the
constant of `mcore/weight_gradient.py`, which needs torch."""


@dataclass(frozen=True)
class Row:
    """This is one packed row, as one rank sees it."""

    tokens: int
    """Positions over all context-parallel ranks, padding included."""
    responses: int
    """Response tokens on this rank."""
    imbalance: float = 1.0
    """Tokens at this rank's experts over their even share."""
    squares: int = 0
    """Sum of the squared lengths of its sequences; only the CPU's latent attention keeps a matrix of weights."""


@dataclass(frozen=True)
class _Sizes:
    """These numbers per rank are what the terms are made of."""

    width: int
    """Bytes of a parameter's type."""
    local: int
    """Positions of this context-parallel rank."""
    sequence: int
    """Those of them that this rank holds between the tensor-parallel regions (sequence parallelism)."""
    keys: int
    """Positions whose keys and values this rank has: all positions of the row."""
    hidden: int
    queries: int
    """Elements of one position's queries on this rank (heads x size)."""
    key_values: int
    """Elements of one position's keys, and of its values, on this rank."""
    heads: int
    squares: int
    routed: int
    """Tokens at this rank's experts, each counted once per expert that it goes to."""


def _sizes(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, row: Row) -> _Sizes:
    local = row.tokens // parallel.context
    sequence = local // parallel.tensor
    routed = 0
    if architecture.experts is not None:
        # Every rank sends its sequence shard; expert-tensor ranks gather what the others of their group received
        routed = int(row.imbalance * sequence * architecture.experts.per_token * parallel.expert_tensor)
    return _Sizes(
        width=DTYPE_BYTES[model.dtype],
        local=local,
        sequence=sequence,
        keys=row.tokens,
        hidden=architecture.hidden_size,
        queries=architecture.heads * architecture.head_dim // parallel.tensor,
        key_values=architecture.key_value_heads * architecture.head_dim // parallel.tensor,
        heads=architecture.heads // parallel.tensor,
        squares=row.squares // parallel.context,
        routed=routed,
    )


def layer_bytes(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    row: Row,
    layer: int,
    implementation: Implementation,
) -> int:
    """Return the bytes of layer `layer` without recomputation."""
    sizes = _sizes(architecture, model, parallel, row)
    experts = experts_of(architecture, layer)
    if implementation == "local":
        return _local_attention(architecture, sizes) + _local_mlp(architecture, parallel, sizes, experts)
    return _te_attention(architecture, sizes) + _te_mlp(architecture, parallel, sizes, experts)


def _norm(rows: int, size: int) -> int:
    """Return what torch's RMSNorm keeps: its input and the normalised rows in float32, and each row's 1 / rms."""
    return rows * (2 * size + 1) * 4


def _local_attention(architecture: Architecture, s: _Sizes) -> int:
    total = _norm(s.sequence, s.hidden) + s.sequence * s.hidden * s.width  # the norm, its output before the projections
    if architecture.latent is not None:
        return total + _local_latent(architecture, architecture.latent, s)
    if architecture.qk_norm:
        total += _norm(s.local * s.heads, architecture.head_dim)
        total += _norm(s.local * s.key_values // architecture.head_dim, architecture.head_dim)
        if s.width == 4:  # without a copy in float32, the norm of the keys keeps the joint output of linear_qkv alive
            total += s.local * (s.queries + s.key_values) * 4
    total += 4 * s.local * architecture.head_dim * s.width  # cosines and sines of queries and of keys
    total += s.local * 2 * s.queries * s.width + s.keys * 2 * s.key_values * s.width  # queries, output, keys, values
    total += s.local * s.heads * 4  # log-sums
    return total + s.local * s.queries * s.width  # the output in row order, input of linear_proj


def _local_latent(architecture: Architecture, latent: LatentAttention, s: _Sizes) -> int:
    """Return what latent attention keeps: float32 copies and the whole matrix of weights.

    torch has no fused attention for values whose size differs from that of the keys.
    """
    total = 0
    for rank in (latent.query_rank or 0, latent.key_value_rank):  # norm of the compressed, input of the up-projection
        total += (_norm(s.sequence, rank) if rank else 0) + s.sequence * rank * s.width
    total += 4 * s.local * latent.rotary_size * s.width
    total += s.heads * (s.local * architecture.head_dim + s.keys * (architecture.head_dim + latent.value_size)) * 4
    return total + s.heads * (s.squares * 4 + s.local * latent.value_size * s.width)


def _local_mlp(architecture: Architecture, parallel: ParallelConfig, s: _Sizes, experts: Experts | None) -> int:
    total = _norm(s.sequence, s.hidden) + s.sequence * s.hidden * s.width
    if experts is None:
        return total + s.local * 5 * (architecture.ffn_size // parallel.tensor) * s.width
    ffn, shared = experts.ffn_size // parallel.expert_tensor, experts.shared_ffn_size // parallel.tensor
    # gate and up projection together, silu, the product, its weighted copy and that copy's cast; weights in float32
    routed = s.routed * ((s.hidden + 6 * ffn) * s.width + 4)
    return total + _routing(experts, s) + routed + s.local * 5 * shared * s.width


def _routing(experts: Experts, s: _Sizes) -> int:
    """Return the bytes of the chosen experts (int64) with their weights (float32), their map (bool and float32), and
    the order of the permutation."""
    return s.sequence * (experts.per_token * (8 + 4 + 8) + experts.count * (1 + 4))


def _te_attention(architecture: Architecture, s: _Sizes) -> int:
    total = s.sequence * (2 * s.hidden * s.width + 4)  # input of the fused norm and linear_qkv, the normed input, 1/rms
    latent = architecture.latent
    if latent is not None:
        ranks = (latent.query_rank or 0) + latent.key_value_rank
        heads = 2 * (architecture.head_dim + latent.value_size)
        return total + s.sequence * 2 * ranks * s.width + s.local * s.heads * (heads * s.width + 4)
    if architecture.qk_norm:
        total += s.local * (
            (s.queries + s.key_values) * s.width + (s.queries + s.key_values) // architecture.head_dim * 4
        )
    # flash attention: queries, keys, values, output (also the input of linear_proj), log-sums
    return total + s.local * (2 * (s.queries + s.key_values) * s.width + s.heads * 4)


def _te_mlp(architecture: Architecture, parallel: ParallelConfig, s: _Sizes, experts: Experts | None) -> int:
    total = s.sequence * (2 * s.hidden * s.width + 4)
    if experts is None:
        return total + s.local * 3 * (architecture.ffn_size // parallel.tensor) * s.width
    ffn, shared = experts.ffn_size // parallel.expert_tensor, experts.shared_ffn_size // parallel.tensor
    # permuted input, gate and up projection together, the weighted product; weights in float32
    routed = s.routed * ((s.hidden + 3 * ffn) * s.width + 4)
    return total + _routing(experts, s) + routed + s.local * 3 * shared * s.width


def head_bytes(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, row: Row) -> int:
    """Return what the final norm and the log-probs keep on the last stage."""
    width = DTYPE_BYTES[model.dtype]
    sequence = row.tokens // (parallel.context * parallel.tensor)
    return _norm(sequence, architecture.hidden_size) + row.responses * (architecture.hidden_size * width + 4 + 8 + 4)


def log_prob_bytes(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, row: Row, entropy: bool = False
) -> int:
    """Return the bytes of the short-lived buffers of `mcore/log_probs.py`, in the larger of its two passes.

    A pass without gradient holds a chunk's logits in float32 and their exponentials. The backward pass holds the logits
    in float32 (twice with the gradient of the entropy) and in the model's type; it adds the output layer's gradient to
    the main gradient, where the types differ in slices of at most `SLICE_BYTES`.
    """
    width, hidden = DTYPE_BYTES[model.dtype], architecture.hidden_size
    rows = vocabulary_rows(architecture, parallel)
    chunk = min(model.log_prob_chunk_tokens, row.responses)
    cast, product = (0, 0) if width == 4 else (width, min(SLICE_BYTES, rows * hidden * width))
    return max(chunk * rows * 8, chunk * rows * (4 + 4 * entropy + cast) + product)


def micro_batches_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Return how many model chunks' activations a stage holds at once, with 1F1B or Megatron's interleaved schedule."""
    left = parallel.pipeline - stage
    if parallel.virtual_pipeline == 1:
        return min(left, micro_batches)
    warm_up = 2 * (left - 1) + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
    return min(warm_up, micro_batches * parallel.virtual_pipeline)


def activation_bytes(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    row: Row,
    *,
    stage: int,
    micro_batches: int,
    implementation: Implementation,
    kept: int = 1,
) -> int:
    """Return the peak of what a rank of `stage` keeps for its backward passes.

    `model.recompute = "selective"` is planned like "none", which is an upper bound. `kept` is `batch.kept_forwards`:
    each micro-batch beyond the first keeps the log-probs of a chunk of its rows as well, and otherwise the buffers of
    log-probs are not included.
    """
    chunks = range(parallel.virtual_pipeline)
    layers = [layer for chunk in chunks for layer in stage_layers(architecture, parallel, stage, chunk)]
    of_layers = [layer_bytes(architecture, model, parallel, row, layer, implementation) for layer in layers]
    kept = min(kept, micro_batches)
    # in units of the stage's whole share of the model
    in_flight = max(kept, micro_batches_in_flight(parallel, stage, micro_batches))
    flying = in_flight / parallel.virtual_pipeline
    inputs = row.tokens // (parallel.context * parallel.tensor) * architecture.hidden_size * DTYPE_BYTES[model.dtype]
    outputs = in_flight * inputs if parallel.virtual_pipeline > 1 else 0  # only the interleaved schedule keeps them
    head = head_bytes(architecture, model, parallel, row) if stage == parallel.pipeline - 1 else 0
    chunk = min(model.log_prob_chunk_tokens, row.responses) * vocabulary_rows(architecture, parallel) * 4
    outputs += (kept - 1) * (head + chunk)
    if model.recompute != "full":
        return int(flying * sum(of_layers)) + outputs + head
    # the head's tensors are freed before the first layer is recomputed
    return int(flying * len(layers) * inputs) + outputs + max(*of_layers, head)
