"""Run the three passes over this rank's tokens in torch, on any device; `evaluate` does what lies between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.amplification import Largest
from fiberpo_megatron.fibration.exact import FloatSums, Limbs, NodeSums, Range, Totals
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.rule import Chunk, Gating, Rule
from fiberpo_megatron.fibration.runs import Runs, iterate
from fiberpo_megatron.fibration.statistics import TokenStatistics
from fiberpo_megatron.fibration.tokens import TokenBatch, ValueRanges


@dataclass(frozen=True)
class GatedTokens:
    """Holds the result of the second pass."""

    ratio: Tensor
    """G, [N]."""
    gradient: Tensor
    """The direct term of dJ/dx, [N]."""
    value: Totals
    """This rank's share of J."""
    node_sums: NodeSums | None
    """What the second reduction sums, `adjoint_terms` sums over [base_nodes, P]; None without nodes or such sums."""


class Passes:
    """Runs the passes over one call's tokens, as elementwise torch operations on chunks of them; `statistics` is None
    when the call wants no metrics."""

    def __init__(self, rule: Rule, batch: TokenBatch, ranges: ValueRanges, runs: Runs, nodes: NodeMap | None) -> None:
        self.rule, self.batch, self.ranges, self.runs, self.nodes = rule, batch, ranges, runs, nodes

    def chunks(self) -> Iterator[Chunk]:
        """Yield the tokens in chunks that stay in cache."""
        batch = self.batch
        for tokens, runs in iterate(self.runs):
            x = batch.log_ratio[tokens]
            if self.ranges.any_beyond_clamp:
                x = x.clamp(-self.rule.max_log_ratio, self.rule.max_log_ratio)
            flat = (x, batch.advantages[tokens], batch.weights[tokens])
            old = None if batch.old_log_probs is None else batch.old_log_probs[tokens]
            yield Chunk(tokens, runs, *flat, self.ranges.any_weightless, old)

    def _sums(self, ranges: Sequence[Range]) -> NodeSums | None:
        if self.nodes is None or not ranges:
            return None
        shape, device = (self.nodes.base_nodes, self.nodes.partitions), self.batch.log_ratio.device
        return Limbs(ranges, shape, device) if self.rule.exact_sums else FloatSums(len(ranges), shape, device)

    def gather(self, table: Tensor | None, chunk: Chunk) -> list[Tensor]:
        """Return the node values [C, base_nodes, P] of a table at each token of the chunk, C tensors [n]."""
        assert self.nodes is not None and table is not None
        return self.nodes.gather(table, chunk.tokens, chunk.runs)

    def first(self, statistics: TokenStatistics | None) -> NodeSums | None:
        """Return `node_terms` sums over [base_nodes, P]; None without nodes."""
        sums = self._sums(self.rule.term_ranges)
        for chunk in self.chunks():
            if self.nodes is not None and sums is not None:
                self.nodes.sum_into(sums, self.rule.terms(chunk), chunk.tokens, chunk.runs)
            if statistics is not None:
                statistics.first(chunk)
        return sums

    def second(self, gating: Gating, statistics: TokenStatistics | None) -> GatedTokens:
        """Return gated ratio, direct gradient and adjoint sums."""
        ratio, gradient = torch.empty_like(self.batch.log_ratio), torch.empty_like(self.batch.log_ratio)
        value = Totals((self.rule.value_range,), ratio.device)
        sums = self._sums(self.rule.adjoint_ranges)
        for chunk in self.chunks():
            values = [] if self.nodes is None else self.gather(gating.node_values, chunk)
            gated = gating.gate(chunk, values)
            ratio[chunk.tokens] = gated.ratio
            # The third pass adds zero to most tokens, but is skipped where nothing is active: -0.0 must not tell.
            torch.add(gated.gradient, 0.0, out=gradient[chunk.tokens])
            share = chunk.scale * gated.ratio
            value.add(0, share)
            if self.nodes is not None and sums is not None and gated.node_terms:
                self.nodes.sum_into(sums, gated.node_terms, chunk.tokens, chunk.runs)
            if statistics is not None:
                statistics.second(chunk, gated)
        return GatedTokens(ratio, gradient, value, sums)

    def third(self, gating: Gating, table: Tensor, gradient: Tensor) -> None:
        """Add to `gradient` what reaches tokens through aggregates; `table` is `gating.adjoint`'s."""
        for chunk in self.chunks():
            gradient[chunk.tokens] += gating.finish(chunk, self.gather(table, chunk))

    def largest(self, gradient: Tensor) -> Largest:
        """Return where this rank's largest |c| / (mu |A|) is, from the whole `gradient`."""
        found = Largest()
        for chunk in self.chunks():
            assert self.nodes is not None
            found.add(chunk, gradient[chunk.tokens], self.nodes.base_of_run[chunk.runs.rows])
        return found
