"""This module computes log-probs and entropy of response tokens, with the vocabulary split over tensor-parallel ranks.

One autograd function goes from hidden states to log-probs and entropies: only response rows pass the output layer, a
chunk of rows at a time. What the last chunk gives for the vocabulary is kept for the backward pass, which computes the
other chunks again: where all rows are one chunk, the output layer is computed once, as in a plain cross-entropy. A rank
never holds more than two tensors [chunk, vocabulary / tensor] in float32, and one where no entropy is asked for.

The gradient of the output layer is added to its main gradient, the float32 buffer that is summed over the ranks, as
Megatron's fused linear layers do with theirs: there is no other tensor of its size.

With z the logits over the temperature, p = softmax(z) and H = -sum_v p_v log p_v, the closed forms are
d log p_a / dz_v = [v = a] - p_v and dH / dz_v = -p_v (log p_v + H).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from fiberpo_megatron.mcore.weight_gradient import MainGradient, add_product


@dataclass(frozen=True)
class VocabShard:
    """Describes this rank's rows of the vocabulary."""

    start: int
    """First token of this rank's rows."""
    group: Any
    """Tensor-parallel group."""
    size: int
    """Ranks of the group."""


def response_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    shard: VocabShard,
    chunk: int,
    entropy_values: bool = True,
    main_gradient: MainGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropy (nats) of logits / temperature at response positions, both float32 [n].

    hidden [t / tensor, 1, h] of the last layer; weight [v, h], this rank's rows of the output layer; labels and
    positions int [n], the tokens and the rows of the packed row that predict them. Both are differentiable in hidden
    and weight; a loss without the entropy in it pays nothing for the entropy's gradient. Without `entropy_values` the
    entropies are zeros, whose gradient is nevertheless that of the entropy: a training pass needs no more. With
    `main_gradient` the weight's gradient is added there in the backward pass, and autograd gets none.
    """
    if shard.size > 1:
        # backward: reduce-scatter, which sums the ranks' shares of the hidden states' gradient
        hidden = gather_from_sequence_parallel_region(hidden, group=shard.group)
    rows = hidden.squeeze(1).index_select(0, positions)
    how = _How(1.0 / temperature, shard, chunk, entropy_values, torch.is_grad_enabled(), main_gradient)
    out: tuple[Tensor, Tensor] = _LinearLogProbs.apply(rows, weight, labels.to(torch.int64), how)
    return out


@dataclass(frozen=True)
class _How:
    """Holds the arguments of `_LinearLogProbs` that have no gradient."""

    scale: float
    shard: VocabShard
    chunk: int
    entropy_values: bool
    keep: bool
    """Whether a backward pass may follow."""
    main_gradient: MainGradient | None


class _LinearLogProbs(torch.autograd.Function):
    """Maps rows [n, h] and weight [v, h] to log softmax(rows weight^T / temperature) at the labels, and to its
    entropy."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, how: _How) -> tuple[Tensor, Tensor]:
        found, log_sums, everything = [], [], None
        for part, label in zip(rows.split(how.chunk), labels.split(how.chunk)):
            del everything  # before the next chunk takes as much memory
            everything, log_sum = _log_softmax(_logits(part, weight, how.scale), how.shard)
            at_label = _at_labels(everything, label, how.shard.start)
            entropy = _entropy(everything) if how.entropy_values else torch.zeros_like(at_label)
            found.append(torch.stack([at_label, entropy]))
            log_sums.append(log_sum)
        log_probs, entropies = _summed(torch.cat(found, 1), how.shard).unbind()
        ctx.save_for_backward(rows, weight, labels, torch.cat(log_sums))
        ctx.how, ctx.last = how, everything if how.keep else None
        ctx.set_materialize_grads(False)  # without a gradient of the entropies, none is computed
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, labels, log_sums = ctx.saved_tensors
        how: _How = ctx.how
        everything, ctx.last = ctx.last, None  # it is overwritten; a second backward pass computes it again
        of_log_probs = log_sums.new_zeros(len(rows)) if gradients[0] is None else gradients[0]
        of_entropies = gradients[1]
        rows_grad = torch.empty_like(rows)
        main = how.main_gradient
        total = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device) if main is None else main.buffer
        for start in reversed(range(0, len(rows), how.chunk)):  # the last chunk, whose values are kept, comes first
            at = slice(start, start + how.chunk)
            part, gradient = rows[at], of_log_probs[at]
            if everything is None:
                everything, _ = _log_softmax(_logits(part, weight, how.scale), how.shard, log_sums[at])
            if of_entropies is None:
                logits_grad = everything.exp_().mul_(-gradient[:, None])
            else:
                entropy = _summed(_entropy(everything), how.shard)
                probabilities = everything.exp()
                slope = everything.add_(entropy[:, None]).mul_(of_entropies[at, None]).add_(gradient[:, None])
                logits_grad = probabilities.mul_(slope.neg_())
                del probabilities, slope
            everything = None
            _add_at_labels(logits_grad, labels[at], how.shard.start, gradient)
            logits_grad = (logits_grad if how.scale == 1.0 else logits_grad.mul_(how.scale)).to(rows.dtype)
            torch.mm(logits_grad, weight, out=rows_grad[at])
            add_product(total, logits_grad, part)
        if main is None:
            return rows_grad, total.to(weight.dtype), None, None
        main.mark_added()
        return rows_grad, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(rows: Tensor, weight: Tensor, scale: float) -> Tensor:
    logits = (rows @ weight.t()).to(_wide(rows))
    return logits if scale == 1.0 else logits.mul_(scale)


def _log_softmax(logits: Tensor, shard: VocabShard, log_sum: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Turn logits [c, v] in place into log-probs of this rank's part of the vocabulary; return them with the logarithm
    [c] of the sum over all ranks' exponentials, which a later call for the same logits takes instead of asking the
    others again. One rank alone neither needs nor returns it (then it is 0)."""
    if shard.size == 1:
        return torch.log_softmax(logits, -1, out=logits), logits.new_zeros(len(logits))
    if log_sum is None:
        peak = logits.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
        log_sum = _summed((logits - peak[:, None]).exp_().sum(-1), shard).log_().add_(peak)
    return logits.sub_(log_sum[:, None]), log_sum


def _entropy(log_probs: Tensor) -> Tensor:
    """Return [c], this rank's part of the entropy."""
    return log_probs.exp().mul_(log_probs).sum(-1).neg_()


def _summed(values: Tensor, shard: VocabShard) -> Tensor:
    """Sum `values` over the tensor-parallel ranks, in place."""
    if shard.size > 1:
        dist.all_reduce(values, group=shard.group)
    return values


def _local(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    local = labels - start
    inside = (local >= 0) & (local < size)
    return torch.where(inside, local, 0)[:, None], inside


def _at_labels(values: Tensor, labels: Tensor, start: int) -> Tensor:
    """Return the [n] values at the labels that are among this rank's rows, 0 at others."""
    local, inside = _local(labels, start, values.size(1))
    return values.gather(1, local).squeeze(1) * inside


def _add_at_labels(target: Tensor, labels: Tensor, start: int, value: Tensor) -> None:
    local, inside = _local(labels, start, target.size(1))
    target.scatter_add_(1, local, (value * inside)[:, None].to(target.dtype))
