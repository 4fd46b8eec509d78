"""Routing knows which experts every token went to: it is recorded in one pass, replayed in others, and counted.

Megatron's routers ask an object in `router.router_replay` for their top-k choice; here it is one of this module's,
which knows the layer. The micro-batch travels with the description of the packed row, so recomputed forwards and
micro-batches in flight find their own record. Records are kept by flat token index: another order or packing of the
same tokens finds them again. They stay in host memory (`routing_table.py`), from which a micro-batch takes its rows of
all layers with one index operation when its first layer asks.
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
from fiberpo_megatron.mcore.routing_table import RoutingTable
from fiberpo_megatron.mcore.uploads import uploaded
from fiberpo_megatron.types import MicroBatch, RoutingMode


class Routing:
    """Holds the routes of one policy. Every rank holds the layers of its stage and the tokens that it routes itself."""

    def __init__(self, models: Sequence[PolicyModel], layout: ParallelLayout) -> None:
        self._layout = layout
        self._mode: RoutingMode = "off"
        self._rows: dict[int, Tensor] = {}
        self._real: dict[int, Tensor] = {}
        self._slots: dict[int, Tensor] = {}
        self._recording: dict[int, tuple[Tensor, set[int]]] = {}
        self._slices: dict[int, Tensor] = {}
        self._in_flight = layout.pipeline_size * layout.chunks
        self.layers: list[int] = []
        """Global numbers, from 0, of this stage's MoE layers."""
        config = models[0].config
        self.all_layers: int = config.num_layers
        self.num_experts = config.num_moe_experts or 0
        self.top_k = config.moe_router_topk if self.num_experts else 0
        for model in models:
            for layer in model.decoder.layers:
                if isinstance(layer, TransformerLayer) and hasattr(layer.mlp, "router"):
                    self._attach(layer)
        self._position = {layer: position for position, layer in enumerate(self.layers)}
        self.clear()

    def _attach(self, layer: TransformerLayer) -> None:
        number = layer.layer_number - 1
        replay = _LayerReplay(self, number)
        layer.mlp.router.router_replay = replay
        layer.register_forward_pre_hook(replay.enter, with_kwargs=True)
        layer.register_forward_hook(replay.leave)
        self.layers.append(number)

    def clear(self) -> None:
        """Forget all routes (at the start of a training step)."""
        self._record = self._table()
        self._engine = self._table()
        self._replays_engine = False
        self._slices.clear()

    def _table(self) -> RoutingTable:
        return RoutingTable(self.num_experts, len(self.layers), self.top_k, self._layout.device)

    @property
    def host_bytes(self) -> int:
        """Return the bytes of host memory that recorded routes and those of the engine take on this rank."""
        return self._record.nbytes + self._engine.nbytes

    def tokens(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return int64 [m], the flat tokens that this rank routes in these micro-batches, in their order."""
        rows = [self._share(batch) for batch in micro_batches]
        joined = torch.cat(rows).long() if rows else torch.empty(0, dtype=torch.int64)
        return joined[joined >= 0]

    def fill(self, tokens: Tensor, experts: Tensor, *, replay: bool) -> None:
        """Take the engine's routes of the flat tokens [m]: integers [m, MoE layers of this stage, top_k], on the host.

        They are what `agreement` compares with and, with `replay`, what passes replay. Raises ValueError when they do
        not fit the model.
        """
        if not self.layers:
            raise ValueError("the model has no experts whose routing could be replayed")
        wanted = (len(tokens), len(self.layers), self.top_k)
        if len(tokens) and tuple(experts.shape) != wanted:
            raise ValueError(
                f"routing of shape {tuple(experts.shape)} does not fit the model: {wanted} is needed ([tokens, MoE "
                f"layers of the stage, experts of a token])"
            )
        if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < self.num_experts:
            raise ValueError(
                f"the engine's routing names experts {int(experts.min())} .. {int(experts.max())} of a model with "
                f"{self.num_experts}; check that the engine serves this model"
            )
        self._engine = self._table()
        if len(tokens):
            self._engine.add(tokens, experts)
        self._replays_engine = replay
        self._slices.clear()

    @contextmanager
    def use(self, mode: RoutingMode) -> Iterator[None]:
        """Record or replay routes in the passes inside this block."""
        self._mode = mode
        try:
            yield
        finally:
            self._mode = "off"
            self._recording.clear()
            self._slices.clear()

    def _share(self, batch: MicroBatch) -> Tensor:
        """Return the flat tokens of a micro-batch that this rank routes; -1 at padding."""
        rows = batch.source_tokens
        if self._layout.tensor_size > 1:  # sequence parallelism: a rank routes its share of the row
            rows = rows.chunk(self._layout.tensor_size)[self._layout.tensor_rank]
        return rows

    def begin(self, index: int, batch: MicroBatch) -> None:
        """Announce the next micro-batch of the coming pass."""
        rows = self._share(batch)
        real = rows >= 0
        self._rows[index] = rows
        self._real[index] = uploaded(real, self._layout.device)
        self._slices.pop(index, None)
        if self._mode == "replay":
            self._slots[index] = self._replayed.find(rows)

    @property
    def _replayed(self) -> RoutingTable:
        return self._engine if self._replays_engine else self._record

    def padding(self, index: int) -> Tensor | None:
        """Return bool [rows], True where a row of the micro-batch on this rank is padding; None if it was not
        announced."""
        real = self._real.get(index)
        return None if real is None else ~real

    def any_token(self, index: int) -> bool:
        """Return whether this rank's share of the micro-batch has any tokens."""
        rows = self._rows.get(index)
        return rows is None or bool((rows >= 0).any())

    def choose(self, layer: int, index: int, scores: Tensor, top_k: Callable[[], tuple[Tensor, Tensor]]) -> Any:
        """Return (scores of the chosen experts, the chosen experts), both [rows, top_k]."""
        values, chosen = top_k()
        if self._mode == "record":
            self._put(layer, index, chosen)
        if self._mode != "replay":
            return values, chosen
        recorded = self._slice(index)[:, self._position[layer]].long()
        chosen = torch.where(self._real[index][:, None], recorded, chosen)
        return scores.gather(1, chosen), chosen

    def _put(self, layer: int, index: int, chosen: Tensor) -> None:
        """Note a layer's experts on the device; with those of the last layer all go to the host."""
        if not self.any_token(index):
            return
        if index not in self._recording:
            self._recording[index] = self._record.empty(len(chosen), on_host=False), set()
        experts, done = self._recording[index]
        experts[:, self._position[layer]] = chosen
        done.add(layer)
        if len(done) == len(self.layers):
            del self._recording[index]
            self._record.add(self._rows[index], experts)

    def _slice(self, index: int) -> Tensor:
        """Return [rows, layers, top_k] on the device: what is replayed in a micro-batch. As many stay there as a
        pipeline has in flight; one that recomputation asks for later comes from the host again."""
        if index not in self._slices:
            while len(self._slices) >= self._in_flight:
                del self._slices[next(iter(self._slices))]
            found = self._replayed.rows(self._slots[index])
            self._slices[index] = found.to(self._layout.device, non_blocking=True)
        return self._slices[index]

    def missing(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        """Return what `replay` would lack for these micro-batches on this rank; None when every token has a route."""
        tokens = self.tokens(micro_batches)
        unknown = tokens[self._replayed.find(tokens) < 0] if self.layers else tokens[:0]
        if not len(unknown):
            return None
        return (
            f"{len(unknown)} tokens have no recorded route, the first is flat token {int(unknown[0])}; record the same "
            "batch, or fill in the rollout's routing, before replaying"
        )

    def chosen(self, tokens: Tensor, *, engine: bool = False) -> dict[int, Tensor]:
        """Return, per layer of this stage, int64 [m, top_k] on the host: the experts of the flat tokens [m], -1 for
        those that this rank has not routed. It is empty when nothing is known. With `engine` they are the engine's."""
        table = self._engine if engine else self._replayed
        if not len(table):
            return {}
        slots = table.find(tokens)
        experts = torch.where(slots[:, None, None] >= 0, table.rows(slots).long(), -1)
        return {layer: experts[:, position] for layer, position in self._position.items()}

    def expert_counts(self, micro_batches: Sequence[MicroBatch], *, engine: bool = False) -> Tensor:
        """Return float32 [n, experts]: the (layer, slot) pairs of the position that predicts each local response token.

        They are summed over all layers of all stages; each row sums to MoE layers x top_k. With `engine` they are those
        of the engine's routes. Every rank calls this. Raises ValueError on every rank when a token has no route.
        """
        table = self._engine if engine else self._replayed
        tokens = self.tokens(micro_batches)
        unknown = tokens[table.find(tokens) < 0] if self.layers else tokens[:0]
        error = (
            f"{len(unknown)} tokens have no route, the first is flat token {int(unknown[0])}" if len(unknown) else None
        )
        self._layout.agree(error, "counting the experts of tokens", raises=ValueError)
        counts = [self._counts(batch, table) for batch in micro_batches]
        total = torch.cat(counts) if counts else torch.zeros(0, self.num_experts, device=self._layout.device)
        if self._layout.pipeline_size > 1:
            dist.all_reduce(total, group=self._layout.pipeline_group)
        return total

    def _counts(self, batch: MicroBatch, table: RoutingTable) -> Tensor:
        rows, device = self._share(batch), self._layout.device
        counts = torch.zeros(len(rows), self.num_experts, device=device)
        chosen = table.rows(table.find(rows)).to(device, non_blocking=True)
        real = uploaded(rows >= 0, device)[:, None].float().expand(len(rows), self.top_k).contiguous()
        for position in self._position.values():
            counts.scatter_add_(1, chosen[:, position].long(), real)
        if self._layout.tensor_size > 1:
            parts = [torch.empty_like(counts) for _ in range(self._layout.tensor_size)]
            dist.all_gather(parts, counts, group=self._layout.tensor_group)
            counts = torch.cat(parts)
        return counts[uploaded(batch.response_positions, device)]

    def agreement(self, micro_batches: Sequence[MicroBatch], bins: Tensor, count: int) -> Tensor:
        """Return float64 [layers of the model, count, 2]: (tokens whose expert set in the record equals the engine's,
        tokens compared), over all ranks, for each of `count` sets of tokens.

        bins: int64 [N] in which set each flat token is, on the host.
        Tokens of which the engine gave no routes are left out. Every rank calls this.
        """
        layout = self._layout
        total = torch.zeros(self.all_layers, count, 2, dtype=torch.float64, device=layout.device)
        for batch in micro_batches:
            tokens = self.tokens([batch])
            ours, theirs = self._record.find(tokens), self._engine.find(tokens)
            known = (ours >= 0) & (theirs >= 0)
            sets = [
                table.rows(slots[known]).to(layout.device).sort(-1).values
                for table, slots in ((self._record, ours), (self._engine, theirs))
            ]
            same = (sets[0] == sets[1]).all(-1).double()
            found = torch.zeros(count, len(self.layers), 2, dtype=torch.float64, device=layout.device)
            of = bins[tokens[known]].to(layout.device)
            found.index_add_(0, of, torch.stack([same, torch.ones_like(same)], -1))  # whole numbers: in any order
            total[self.layers] += found.transpose(0, 1)
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
