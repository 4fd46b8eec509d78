"""Routing knows which experts every token went to: it is recorded in one pass, replayed in others, and counted.

Megatron's routers ask an object in `router.router_replay` for their top-k choice; here it is one of this module's,
which knows the layer. The micro-batch travels with the description of the packed row, so recomputed forwards and
micro-batches in flight find their own record. Records are kept by flat token index: another layout, order or packing of
the same tokens finds them again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from fiberpo_megatron.mcore.model import PolicyModel
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.types import MicroBatch, RoutingMode


class Routing:
    """Holds the record of one policy. Every rank holds the layers of its stage and the tokens that it routed."""

    def __init__(self, models: Sequence[PolicyModel], layout: ParallelLayout) -> None:
        self._layout = layout
        self._mode: RoutingMode = "off"
        self._rows: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}
        self._experts: dict[int, Tensor] = {}
        self.layers: list[int] = []
        """Global numbers, from 0, of this stage's MoE layers."""
        self.num_experts = models[0].config.num_moe_experts or 0
        self.top_k = models[0].config.moe_router_topk if self.num_experts else 0
        for model in models:
            for layer in model.decoder.layers:
                if isinstance(layer, TransformerLayer) and hasattr(layer.mlp, "router"):
                    self._attach(layer)

    def _attach(self, layer: TransformerLayer) -> None:
        number = layer.layer_number - 1
        replay = _LayerReplay(self, number)
        layer.mlp.router.router_replay = replay
        layer.register_forward_pre_hook(replay.enter, with_kwargs=True)
        layer.register_forward_hook(replay.leave)
        self.layers.append(number)

    @property
    def recorded(self) -> bool:
        """Return whether there is anything to replay."""
        return bool(self._experts)

    def clear(self) -> None:
        """Forget all records (at the start of a training step)."""
        self._experts = {}

    def fill(self, experts: Tensor) -> None:
        """Take the rollout's routing: int [N, MoE layers, top_k] by flat token index, -1 where there is none."""
        if not self.layers:
            raise ValueError("the model has no experts whose routing could be replayed")
        if experts.dim() != 3 or experts.size(2) != self.top_k or experts.size(1) <= max(self.layers):
            raise ValueError(
                f"routing of shape {tuple(experts.shape)} does not fit the model: [tokens, MoE layers, "
                f"{self.top_k}] is needed, with layer {max(self.layers)} on this stage"
            )
        device = self._layout.device
        self._experts = {layer: experts[:, layer].to(device, torch.int64) for layer in self.layers}

    @contextmanager
    def use(self, mode: RoutingMode) -> Iterator[None]:
        """Record or replay routes in the passes inside this block."""
        self._mode = mode
        try:
            yield
        finally:
            self._mode = "off"

    def begin(self, index: int, batch: MicroBatch) -> None:
        """Announce the next micro-batch of the coming pass."""
        rows = batch.source_tokens
        if self._layout.tensor_size > 1:  # sequence parallelism: a rank routes its share of the row
            rows = rows.chunk(self._layout.tensor_size)[self._layout.tensor_rank]
        self._tokens[index] = int((rows >= 0).sum())
        self._rows[index] = rows.to(self._layout.device)

    def padding(self, index: int) -> Tensor | None:
        """Return bool [rows], True where a row of the micro-batch on this rank is padding; None if it was not
        announced."""
        rows = self._rows.get(index)
        return None if rows is None else rows < 0

    def any_token(self, index: int) -> bool:
        """Return whether this rank's share of the micro-batch has any tokens."""
        return self._tokens.get(index) != 0

    def choose(self, layer: int, index: int, scores: Tensor, top_k: Callable[[], tuple[Tensor, Tensor]]) -> Any:
        """Return (scores of the chosen experts, the chosen experts), both [rows, top_k]."""
        if self._mode == "off":
            return top_k()
        rows = self._rows[index]
        real = rows >= 0
        values, chosen = top_k()
        if self._mode == "record":
            self._put(layer, rows[real], chosen[real])
            return values, chosen
        chosen = torch.where(real[:, None], self._get(layer, rows), chosen)
        return scores.gather(1, chosen), chosen

    def _put(self, layer: int, tokens: Tensor, experts: Tensor) -> None:
        table = self._experts.get(layer)
        size = int(tokens.max()) + 1 if len(tokens) else 0
        if table is None or len(table) < size:
            wider = torch.full((size, experts.size(1)), -1, dtype=torch.int64, device=experts.device)
            if table is not None:
                wider[: len(table)] = table
            self._experts[layer] = table = wider
        table[tokens] = experts

    def _get(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the experts of the tokens; those of padding are arbitrary. Raises ValueError if a token has no
        record."""
        table = self._experts.get(layer)
        if table is None:
            table = torch.empty(0, self.top_k, dtype=torch.int64, device=tokens.device)
        known = torch.zeros_like(tokens, dtype=torch.bool)
        inside = (tokens >= 0) & (tokens < len(table))
        known[inside] = table[tokens[inside], 0] >= 0
        missing = tokens[(tokens >= 0) & ~known]
        if len(missing):
            raise ValueError(
                f"{len(missing)} tokens have no recorded route in layer {layer}, the first is flat token "
                f"{int(missing[0])}; record the same batch, or fill in the rollout's routing, before replaying"
            )
        experts = torch.zeros(len(tokens), self.top_k, dtype=torch.int64, device=tokens.device)
        experts[known] = table[tokens[known]]
        return experts

    def missing(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        """Return what `replay` would lack for these micro-batches on this rank; None when every token has a route."""
        try:
            for batch in micro_batches:
                self.begin(0, batch)
                for layer in self.layers:
                    self._get(layer, self._rows[0])
        except ValueError as error:
            return str(error)
        return None

    def chosen(self, tokens: Tensor) -> dict[int, Tensor]:
        """Return, per layer of this stage that has a record, int64 [m, top_k] on the host: the experts of the flat
        tokens [m], -1 for those that this rank has not routed."""
        found = {}
        for layer, table in self._experts.items():
            inside = tokens.to(table.device)
            inside = inside[inside < len(table)]
            experts = torch.full((len(tokens), table.size(1)), -1)
            experts[tokens < len(table)] = table[inside].cpu()
            found[layer] = experts
        return found

    def expert_counts(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return float32 [n, experts]: the (layer, slot) pairs of the position that predicts each local response token.

        They are summed over all layers of all stages; each row sums to MoE layers x top_k. Every rank calls this.
        """
        counts = [self._counts(batch) for batch in micro_batches]
        total = torch.cat(counts) if counts else torch.zeros(0, self.num_experts, device=self._layout.device)
        if self._layout.pipeline_size > 1:
            dist.all_reduce(total, group=self._layout.pipeline_group)
        return total

    def _counts(self, batch: MicroBatch) -> Tensor:
        self.begin(0, batch)
        rows = self._rows[0]
        counts = torch.zeros(len(rows), self.num_experts, device=rows.device)
        real = rows >= 0
        for layer in self.layers:
            chosen = self._get(layer, rows)
            counts.scatter_add_(1, chosen, real[:, None].float().expand(chosen.shape).contiguous())
        if self._layout.tensor_size > 1:
            parts = [torch.empty_like(counts) for _ in range(self._layout.tensor_size)]
            dist.all_gather(parts, counts, group=self._layout.tensor_group)
            counts = torch.cat(parts)
        return counts[batch.response_positions.to(counts.device)]

    def agreement(self, micro_batches: Sequence[MicroBatch], experts: Tensor) -> Tensor:
        """Return float64 [MoE layers, 2]: (tokens whose expert set equals `experts`' one, tokens compared), over all
        ranks.

        experts: int [N, MoE layers, top_k] by flat token index, -1 where unknown (those are left out). They are
        compared with the record; every rank calls this.
        """
        total = torch.zeros(experts.size(1), 2, dtype=torch.float64, device=self._layout.device)
        for batch in micro_batches:
            self.begin(0, batch)
            tokens = self._rows[0]
            tokens = tokens[tokens >= 0]
            for layer in self.layers:
                theirs = experts[tokens.cpu(), layer].to(tokens.device, torch.int64).sort(-1).values
                known = theirs[:, 0] >= 0
                same = (self._get(layer, tokens).sort(-1).values == theirs).all(-1)
                total[layer] += torch.stack([(same & known).sum(), known.sum()]).double()
        layout = self._layout
        for size, group in (
            (layout.tensor_size, layout.tensor_group),
            (layout.pipeline_size, layout.pipeline_group),
        ):
            if size > 1:
                dist.all_reduce(total, group=group)
        return layout.sum_over_tokens(total)


class _LayerReplay:
    """Is one layer's `router_replay`, the object that Megatron's top-k asks."""

    def __init__(self, routing: Routing, layer: int) -> None:
        self._routing = routing
        self._layer = layer
        self._index = 0

    def enter(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Note before the layer's forward pass, recomputed ones included, which micro-batch it processes."""
        self._index = getattr(kwargs.get("packed_seq_params"), "micro_batch", 0)

    def leave(self, module: torch.nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        """Note after the layer's forward pass that its backward pass belongs to the same micro-batch.

        The backward pass may compute the router again without the layer around it.
        """
        if output[0].requires_grad:
            output[0].register_hook(partial(self._again, self._index))

    def _again(self, index: int, gradient: Tensor) -> None:
        self._index = index

    def padding(self) -> Tensor | None:
        """Return `Routing.padding` of the micro-batch that the layer works on."""
        return self._routing.padding(self._index)

    def any_token(self) -> bool:
        """Return `Routing.any_token` of the micro-batch that the layer works on."""
        return self._routing.any_token(self._index)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Answer Megatron's hook, which replaces its top-k; see `Routing.choose`."""
        assert default_compute_topk is not None

        def choose() -> tuple[Tensor, Tensor]:
            return default_compute_topk(scores, topk, num_groups, group_topk)

        chosen: tuple[Tensor, Tensor] = self._routing.choose(self._layer, self._index, scores, choose)
        return chosen
