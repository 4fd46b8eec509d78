"""This module passes micro-batches through Megatron's pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from fiberpo_megatron.mcore.log_probs import VocabShard, response_log_probs
from fiberpo_megatron.mcore.model import PolicyModel
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.platform import activate
from fiberpo_megatron.mcore.routing import Routing
from fiberpo_megatron.mcore.schedule_spans import named_passes
from fiberpo_megatron.types import MicroBatch, TokenScores

TokenLoss = Callable[[int, Tensor, Tensor], Tensor]
"""Maps (index of the micro-batch, its log-probs [n] and entropies [n], both with gradient) to a scalar that is
minimised."""


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

    def forward(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[TokenScores]:
        """Return the scores of every micro-batch without gradient, in order; none if the last stage is on another
        rank."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            return self._run(micro_batches, partial(self._scores, temperature), forward_only=True)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], temperature: float, loss: TokenLoss) -> None:
        """Add the gradient of the summed losses to the gradient buffers and reduce them over ranks."""
        for chunk in self.chunks:
            chunk.train()
        self._run(micro_batches, partial(self._minimise, temperature, loss), forward_only=False)

    def _run(self, micro_batches: Sequence[MicroBatch], head: Callable[..., Any], forward_only: bool) -> list[Any]:
        prepared = [self._prepare(index, batch) for index, batch in enumerate(micro_batches)]
        filling = self._prepare(len(micro_batches), self._empty())
        # Packing makes the number a multiple; a single row (a probe) does not.
        prepared += [filling] * (-len(prepared) % self.layout.micro_batch_multiple)
        run = get_forward_backward_func()
        with named_passes(self.chunks, len(prepared)):
            return run(
                forward_step_func=partial(self._forward_step, head),
                data_iterator=[iter(prepared) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(prepared),
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

    def _prepare(self, index: int, batch: MicroBatch) -> tuple[int, MicroBatch, Any]:
        layout = self.layout
        packed = self._platform.packed_sequences(
            batch.cu_seqlens, batch.max_seqlen, layout.context_rank, layout.context_size
        )
        packed.micro_batch = index  # travels with every forward of the row, recomputed ones too
        if self.routing is not None:
            self.routing.begin(index, batch)
        return index, batch, packed

    def _forward_step(
        self, head: Callable[..., Any], data: Iterator[tuple[int, MicroBatch, Any]], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        index, batch, packed = next(data)
        device = self.layout.device
        hidden = chunk(
            batch.tokens.to(device)[None],
            batch.position_ids.to(device)[None],
            attention_mask=None,
            packed_seq_params=packed,
        )
        return hidden, partial(head, index, batch)

    def log_probs_of(self, batch: MicroBatch, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropy [n] of the micro-batch's response tokens."""
        model, layout = self.models[-1], self.layout
        positions = batch.response_positions.to(layout.device)
        shard = VocabShard(
            start=layout.tensor_rank * model.output_rows, group=layout.tensor_group, size=layout.tensor_size
        )
        return response_log_probs(
            hidden,
            model.output_weight(),
            batch.labels.to(layout.device)[positions],
            positions,
            temperature=temperature,
            shard=shard,
            chunk=self.log_prob_chunk,
        )

    def _scores(
        self, temperature: float, index: int, batch: MicroBatch, hidden: Tensor, non_loss_data: bool = True
    ) -> TokenScores:
        return TokenScores(*self.log_probs_of(batch, hidden, temperature))

    def _minimise(
        self, temperature: float, loss: TokenLoss, index: int, batch: MicroBatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        log_probs, entropy = self.log_probs_of(batch, hidden, temperature)
        # With three outputs Megatron does not divide the loss (calculate_per_token_loss).
        return loss(index, log_probs, entropy), torch.tensor(0, dtype=torch.int, device=hidden.device), {}
