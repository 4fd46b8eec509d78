"""This module passes micro-batches through Megatron's pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from fiberpo_megatron.mcore.log_probs import VocabShard, response_log_probs
from fiberpo_megatron.mcore.model import PolicyModel
from fiberpo_megatron.mcore.optimizers.gather import wait_for
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.platform import activate
from fiberpo_megatron.mcore.routing import Routing
from fiberpo_megatron.mcore.schedule_spans import named_passes
from fiberpo_megatron.mcore.uploads import uploaded
from fiberpo_megatron.mcore.weight_gradient import MainGradient
from fiberpo_megatron.types import MicroBatch, TokenScores

TokenLoss = Callable[[int, Tensor, Tensor], Tensor]
"""Maps (index of the micro-batch, its log-probs [n] and entropies [n], both with gradient) to a scalar that is
minimised. The entropies have their gradient, but not their values (`response_log_probs`)."""


@dataclass(frozen=True)
class _Row:
    """This is a micro-batch as the passes need it, on the model's device. All ids are int32."""

    index: int
    tokens: Tensor
    """[1, t]"""
    position_ids: Tensor
    """[1, t]"""
    response_positions: Tensor
    """[n] local positions that predict a response token."""
    labels: Tensor
    """[n] those response tokens."""
    packed: Any
    """Megatron's description of the packed row."""


@dataclass(frozen=True)
class _Kept:
    """This is a finished forward pass of a row whose backward pass is still to come."""

    row: _Row
    hidden: Tensor
    """What the model returned."""
    scores: tuple[Tensor, Tensor]
    """Log-probs and entropies with their gradients."""


class Schedule:
    """Runs the model chunks of this process over micro-batches, forward only or forward and backward."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        models: Sequence[PolicyModel],
        layout: ParallelLayout,
        log_prob_chunk: int,
        routing: Routing | None = None,
    ) -> None:
        self.chunks = list(chunks)
        self.models = list(models)
        self.layout = layout
        self.log_prob_chunk = log_prob_chunk
        self.routing = routing
        self._platform = activate()
        self._wrapped = isinstance(self.chunks[-1], DistributedDataParallel)
        self._last: tuple[list[MicroBatch], list[_Row]] = [], []
        self._keeping = 0
        """Rows whose forward passes the running pass keeps."""
        self._kept: dict[int, _Kept] = {}
        """What the last pass has kept, by the number of its row."""

    def forward(
        self, micro_batches: Sequence[MicroBatch], temperature: float, *, entropy: bool = True, keep: int = 0
    ) -> list[TokenScores]:
        """Return the scores of every micro-batch without gradient, in order; none if the last stage is on another
        rank. Without `entropy` the entropies are zeros, and their computation is saved.

        The forward passes of the first `keep` micro-batches have their graphs, and are kept for the next pass. If that
        is one with gradients over the same micro-batches, with the same weights, it goes on from there, and so many
        forward passes are saved. The activations of one micro-batch are those that a pass with gradients takes anyway,
        later; those of more take more memory. In a pipeline `keep` has to be 0.
        """
        self.forget()
        for chunk in self.chunks:
            chunk.eval()
        rows = self._prepared(micro_batches)
        keep = min(keep, len(rows))
        # what is kept takes memory: it is computed last here, and used first later
        order, self._keeping = [*rows[keep:], *rows[:keep]], keep
        try:
            with torch.no_grad():
                scores = self._run(order, partial(self._scores, temperature, entropy), forward_only=True)
        finally:
            self._keeping = 0
        first = len(scores) - keep if scores else 0
        return [*scores[first:], *scores[:first]]

    def forget(self) -> None:
        """Release the activations that the last pass has kept."""
        self._kept = {}

    def forward_backward(self, micro_batches: Sequence[MicroBatch], temperature: float, loss: TokenLoss) -> int:
        """Add the gradient of the summed losses to the gradient buffers and reduce them over ranks.

        Return the number of micro-batches that went on from the pass before.
        """
        for chunk in self.chunks:
            chunk.train()
        rows = self._prepared(micro_batches)
        kept = sum(self._is_kept(row) for row in rows)
        self._run(rows, partial(self._minimise, temperature, loss), forward_only=False)
        return kept

    def _run(self, rows: Sequence[_Row], head: Callable[..., Any], forward_only: bool) -> list[Any]:
        run = get_forward_backward_func()
        with named_passes(self.chunks, [row.index for row in rows]):
            return run(
                forward_step_func=partial(self._forward_step, head),
                data_iterator=[iter(rows) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(rows),
                seq_length=1,  # unused: rows differ in length, which stages exchange (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _empty(self) -> MicroBatch:
        size = self.layout.sequence_multiple
        local = torch.arange(size // self.layout.context_size)
        zero, none = torch.zeros_like(local), torch.empty(0, dtype=torch.int64)
        bounds = torch.tensor([0, size], dtype=torch.int32)
        return MicroBatch(zero, zero, zero, none, none, zero - 1, bounds, size)

    def _prepared(self, micro_batches: Sequence[MicroBatch]) -> list[_Row]:
        """Return the rows of a pass, and announce them to the routing.

        Their ids are on the way to the device before the first micro-batch begins. Passes over the same micro-batches
        that follow each other, as those of an optimiser step do, share the rows.
        """
        # Packing makes the number a multiple; a single row (a probe) does not.
        batches = list(micro_batches)
        batches += [self._empty()] * (-len(batches) % self.layout.micro_batch_multiple)
        known, rows = self._last
        if [id(batch) for batch in known] != [id(batch) for batch in micro_batches]:
            rows = [self._row(index, batch) for index, batch in enumerate(batches)]
            self._last = list(micro_batches), rows
        if self.routing is not None:
            for index, batch in enumerate(batches):
                self.routing.begin(index, batch)
        return rows

    def _row(self, index: int, batch: MicroBatch) -> _Row:
        layout, positions = self.layout, batch.response_positions
        parts = [batch.tokens, batch.position_ids, positions, batch.labels[positions], batch.cu_seqlens]
        ids = torch.cat([part.to(torch.int32) for part in parts])
        ids = uploaded(ids, layout.device)  # one copy
        tokens, position_ids, positions, labels, bounds = ids.split([len(part) for part in parts])
        packed = self._platform.packed_sequences(bounds, batch.max_seqlen, layout.context_rank, layout.context_size)
        packed.micro_batch = index  # travels with every forward of the row, recomputed ones too
        return _Row(index, tokens[None], position_ids[None], positions, labels, packed)

    def _forward_step(
        self, head: Callable[..., Any], data: Iterator[_Row], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        row = next(data)
        if self._is_kept(row):
            return self._kept[row.index].hidden, partial(head, row)
        if self._keeps(row):
            chunk.train()
        with torch.enable_grad() if self._keeps(row) else nullcontext():
            hidden = chunk(row.tokens, row.position_ids, attention_mask=None, packed_seq_params=row.packed)
        return hidden, partial(head, row)

    def _keeps(self, row: _Row) -> bool:
        return row.index < self._keeping

    def _is_kept(self, row: _Row) -> bool:
        return row.index in self._kept and self._kept[row.index].row is row

    def log_probs_of(self, row: _Row, hidden: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropy [n] of the row's response tokens; see `response_log_probs`."""
        model, layout = self.models[-1], self.layout
        shard = VocabShard(
            start=layout.tensor_rank * model.output_rows, group=layout.tensor_group, size=layout.tensor_size
        )
        weight = model.output_parameter()
        wait_for(self.chunks[-1], weight)
        main = None
        if self._wrapped and weight.requires_grad and torch.is_grad_enabled():
            embedded = model.share_embeddings_and_output_weights and model.pre_process
            main = MainGradient(weight, model.vocab_rows, only_use=not embedded)
        return response_log_probs(
            hidden,
            weight[: model.vocab_rows],
            row.labels,
            row.response_positions,
            temperature=temperature,
            shard=shard,
            chunk=self.log_prob_chunk,
            entropy_values=entropy,
            main_gradient=main,
        )

    def _scores(
        self, temperature: float, entropy: bool, row: _Row, hidden: Tensor, non_loss_data: bool = True
    ) -> TokenScores:
        if not self._keeps(row):
            return TokenScores(*self.log_probs_of(row, hidden, temperature, entropy))
        with torch.enable_grad():
            scores = self.log_probs_of(row, hidden, temperature, entropy)
        self._kept[row.index] = _Kept(row, hidden, scores)
        return TokenScores(scores[0].detach(), scores[1].detach())

    def _minimise(
        self, temperature: float, loss: TokenLoss, row: _Row, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self._is_kept(row):
            log_probs, entropy = self._kept.pop(row.index).scores
        else:
            log_probs, entropy = self.log_probs_of(row, hidden, temperature, entropy=False)
        # With three outputs Megatron does not divide the loss (calculate_per_token_loss).
        return loss(row.index, log_probs, entropy), torch.zeros((), dtype=torch.int, device=hidden.device), {}
