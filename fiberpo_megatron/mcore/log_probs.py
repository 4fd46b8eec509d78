"""This module computes log-probs and entropy of response tokens, with the vocabulary split over tensor-parallel ranks.

One autograd function goes from hidden states to log-probs and entropies: only response rows pass the output layer, a
chunk of rows at a time, and the backward pass computes each chunk's logits again. A rank therefore never holds more
than [chunk, vocabulary / tensor] in float32 (twice that where the entropy has a gradient), and never a softmax over the
whole vocabulary.

With z the logits over the temperature, p = softmax(z) and H = -sum_v p_v log p_v, the closed forms are
d log p_a / dz_v = [v = a] - p_v and dH / dz_v = -p_v (log p_v + H).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropy (nats) of logits / temperature at response positions, both float32 [n].

    hidden [t / tensor, 1, h] of the last layer; weight [v, h], this rank's rows of the output layer; labels and
    positions int64 [n], the tokens and the rows of the packed row that predict them. Both are differentiable in hidden
    and weight; a loss without the entropy in it pays nothing for the entropy's gradient.
    """
    if shard.size > 1:
        # backward: reduce-scatter, which sums the ranks' shares of the hidden states' gradient
        hidden = gather_from_sequence_parallel_region(hidden, group=shard.group)
    rows = hidden.squeeze(1).index_select(0, positions)
    out: tuple[Tensor, Tensor] = _LinearLogProbs.apply(rows, weight, labels, 1.0 / temperature, shard, chunk)
    return out


class _LinearLogProbs(torch.autograd.Function):
    """Maps rows [n, h] and weight [v, h] to log softmax(rows weight^T / temperature) at the labels, and to its
    entropy."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, scale: float, shard: VocabShard, chunk: int
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies, log_sums = [], [], []
        for part, label in zip(rows.split(chunk), labels.split(chunk)):
            logits = _logits(part, weight, scale)
            peak = logits.amax(-1)
            if shard.size > 1:
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
            shifted = logits.sub_(peak[:, None])
            at_label = _at_labels(shifted, label, shard.start)
            weights = shifted.exp()
            sums = torch.stack([weights.sum(-1), (weights * shifted).sum(-1), at_label])
            if shard.size > 1:
                dist.all_reduce(sums, group=shard.group)
            total, mean, at_label = sums.unbind()
            log_total = total.log()
            log_probs.append(at_label - log_total)
            entropies.append(log_total - mean / total)
            log_sums.append(log_total + peak)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(rows, weight, labels, torch.cat(log_sums), entropy)
        ctx.scale, ctx.shard, ctx.chunk = scale, shard, chunk
        ctx.set_materialize_grads(False)  # without a gradient of the entropies, none is computed
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, labels, log_sums, entropies = ctx.saved_tensors
        of_log_probs = torch.zeros_like(log_sums) if gradients[0] is None else gradients[0]
        of_entropies = gradients[1]
        rows_grad = torch.empty_like(rows)
        weight_grad = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        pieces = (x.split(ctx.chunk) for x in (rows, rows_grad, labels, log_sums, entropies, of_log_probs))
        for at, (part, part_grad, label, log_sum, entropy, gradient) in enumerate(zip(*pieces)):
            logits_grad = _logits(part, weight, ctx.scale).sub_(log_sum[:, None])
            if of_entropies is None:
                logits_grad.exp_().mul_(-gradient[:, None])
            else:
                of_entropy = of_entropies[at * ctx.chunk : at * ctx.chunk + len(part)]
                slope = (logits_grad + entropy[:, None]).mul_(of_entropy[:, None]).add_(gradient[:, None])
                logits_grad.exp_().mul_(slope.neg_())
            _add_at_labels(logits_grad, label, ctx.shard.start, gradient)
            logits_grad = logits_grad.mul_(ctx.scale).to(rows.dtype)
            torch.mm(logits_grad, weight, out=part_grad)
            weight_grad += logits_grad.t() @ part
        return rows_grad, weight_grad.to(weight.dtype), None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(rows: Tensor, weight: Tensor, scale: float) -> Tensor:
    return (rows @ weight.t()).to(_wide(rows)).mul_(scale)


def _local(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    local = labels - start
    inside = (local >= 0) & (local < size)
    return torch.where(inside, local, 0)[:, None], inside


def _at_labels(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    """Return the [n] logits at the labels that are among this rank's rows, 0 at others."""
    local, inside = _local(labels, start, logits.size(1))
    return logits.gather(1, local).squeeze(1) * inside


def _add_at_labels(target: Tensor, labels: Tensor, start: int, value: Tensor) -> None:
    local, inside = _local(labels, start, target.size(1))
    target.scatter_add_(1, local, (value * inside)[:, None].to(target.dtype))
