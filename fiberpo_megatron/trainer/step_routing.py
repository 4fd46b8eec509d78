"""This module finds the experts of a step's tokens: it records, takes from the rollouts, replays and compares them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fiberpo_megatron.interfaces import Passes
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.trainer.lags import route_lags
from fiberpo_megatron.trainer.settings import AlgorithmConfig
from fiberpo_megatron.types import RolloutBatch, RoutingMode


@dataclass(frozen=True)
class StepRouting:
    """This is the routing of one training step. Use it in this order: `begin`, the old-log-prob pass in `mode`,
    `attach`."""

    policy: Passes
    algorithm: AlgorithmConfig
    uses_experts: bool
    """Whether the objective has an expert level."""
    rollouts: RolloutBatch
    version: int = -1
    """That of the trainer's weights; -1: it is not known how old those were that sampled a token."""

    @property
    def returned(self) -> bool:
        """This says whether the engine returned its routing."""
        return len(self.rollouts.routing_rows) > 0

    @property
    def mode(self) -> RoutingMode:
        """This says what the old-log-prob pass does."""
        if self.algorithm.routing_replay == "rollout":
            return "replay"
        recorded = self.uses_experts and self.algorithm.expert_routing == "old"
        return "record" if recorded or self.returned or self.algorithm.routing_replay == "old" else "off"

    def begin(self, parts: Sequence[MiniBatch]) -> None:
        """Forget the last step's routes, and take the engine's for the tokens that this rank routes in these parts."""
        if self.mode == "off":
            return
        routing = self.policy.routing
        routing.clear()
        if not self.returned:
            return
        layout = self.policy.layout
        tokens = routing.tokens([batch for part in parts for batch in part.micro_batches])
        known, experts = layout.routes(self.rollouts, tokens, routing.layers)
        with together(layout, "taking the engines' expert routing"):
            self._check(tokens[~known])
            routing.fill(tokens[known], experts, replay=self.mode == "replay")

    def _check(self, unknown: Tensor) -> None:
        """ValueError naming the first token without a route, where the run trains with the engines' routes."""
        if not len(unknown) or "rollout" not in (self.algorithm.routing_replay, self.algorithm.expert_routing):
            return
        flat = int(unknown.min())
        sequence = int(np.searchsorted(self.rollouts.offsets, flat, side="right")) - 1
        place, trajectory = flat - int(self.rollouts.offsets[sequence]), int(self.rollouts.trajectories[sequence])
        raise ValueError(
            f"{len(unknown)} tokens have no route of an engine, the first is token {place} of trajectory {trajectory} "
            f"(sequence {sequence}, token id {int(self.rollouts.tokens[flat])}); check that all engines serve this "
            'model, or set algorithm.routing_replay and algorithm.expert_routing to anything but "rollout"'
        )

    def attach(self, parts: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Return the parts with their tokens' expert shares, for an objective with an expert level."""
        return [replace(part, expert_share=self._share(part)) for part in parts] if self.uses_experts else list(parts)

    def _share(self, part: MiniBatch) -> Tensor:
        experts = self.policy.routing.num_experts
        partitions = self.algorithm.expert_partitions or self.policy.layout.expert_size
        if not experts:
            raise ValueError("the objective has an expert level, but the model has no experts; choose another")
        engine = self.algorithm.expert_routing == "rollout"
        counts = self.policy.routing.expert_counts(part.micro_batches, engine=engine)
        return partition_share(counts, partitions)

    def agreement(self, parts: Sequence[MiniBatch]) -> dict[str, float]:
        """Return per layer the share of tokens whose expert set is the engine's, and over all layers by the lag of the
        weights that routed a token; empty when there is nothing to compare.

        Every rank calls it."""
        if not self.returned or self.mode != "record":
            return {}
        bins, lags = route_lags(self.rollouts, self.version)
        of, count = torch.from_numpy(bins), len(lags) + 1
        equal, compared = (
            torch.stack([self.policy.routing.agreement(part.micro_batches, of, count) for part in parts])
            .sum(0)
            .unbind(-1)
        )
        layers = (equal.sum(1) / compared.sum(1)).tolist()
        metrics = {f"routing_agreement/layer_{layer}": share for layer, share in enumerate(layers)}
        by_lag = (equal.sum(0) / compared.sum(0))[1:].tolist()
        metrics |= {f"routing_agreement/lag/{lag}": share for lag, share in zip(lags, by_lag, strict=True)}
        return metrics | {"routing_agreement/mean": float(equal.sum() / compared.sum())}


def partition_share(counts: Tensor, partitions: int) -> Tensor:
    """Return omega, float64 [n, partitions]: the share of each token's routed pairs in each contiguous block of experts
    (docs/fibration.md, expert partitions), from counts [n, experts].

    Raises ValueError when the experts do not divide.
    """
    experts = counts.size(1)
    if experts % partitions:
        fits = [p for p in range(1, experts + 1) if experts % p == 0]
        raise ValueError(
            f"algorithm.expert_partitions = {partitions} does not divide the {experts} experts; use one of {fits}"
        )
    blocks = counts.double().view(len(counts), partitions, experts // partitions).sum(-1)
    return blocks / blocks.sum(-1, keepdim=True)
