"""Hold what a user sees of an objective call: typed, global over ranks, flat for a log line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fiberpo_megatron.fibration.gates import MINUS, PLUS, GatedTree


@dataclass(frozen=True)
class Spread:
    """Holds mean and 99th percentile over the nodes of a level (exact: node tables are known to all ranks)."""

    mean: float
    p99: float


@dataclass(frozen=True)
class RatioMetrics:
    """Describes the importance ratio r over all tokens."""

    mean: float
    p99: float
    """From a histogram of log r: within 1.6 % of |log r|."""
    max: float
    """Within 2**-16 of |log r|."""


@dataclass(frozen=True)
class TokenMetrics:
    """Describes the tokens and their clip; a token is clipped when its own clip stops its direct gradient."""

    count: float
    weight: float
    """Sum of mu, 1 when the caller normalised it."""
    clip_share: float
    trajectories_none_clipped: float | None
    """Shares of trajectories; None when keys has no "trajectory"."""
    trajectories_some_clipped: float | None
    trajectories_all_clipped: float | None


@dataclass(frozen=True)
class ChannelMetrics:
    """Describes one channel of a level's gate: shares of nodes, and the aggregate S."""

    passed: float
    rollback: float
    zeroed: float
    aggregate: Spread


@dataclass(frozen=True)
class LevelMetrics:
    """Describes the gate of one level; the five joint regimes of both channels are shares of nodes and sum to 1.

    They are those of figure 2 and page 12 of arXiv:2603.08239.
    """

    name: str
    nodes: int
    plus: ChannelMetrics
    minus: ChannelMetrics
    base_weight: Spread
    total_variation: Spread
    """Bound on the mean total variation between old and current policy over a node's tokens: sqrt(|S+ - S-| / 2), by
    Pinsker's inequality as in claim 3.5 of arXiv:2603.08239, with the drift as the estimate of the divergence."""
    both_pass: float
    """G-I."""
    one_rollback: float
    """G-II,r: one channel is in rollback, the other passes."""
    one_zeroed: float
    """G-II: one channel is zeroed, the other passes."""
    both_rollback: float
    """G-III,r: both channels are beyond their budgets, at least one of them in rollback."""
    both_zeroed: float
    """G-III."""


@dataclass(frozen=True)
class ExpertMetrics:
    """Describes the expert partitions; p indexes the partition."""

    mass: tuple[float, ...]
    """Share of the mini-batch's weight routed to p; sums to 1."""
    drift: tuple[float, ...]
    """Mean |log r| of the weight routed to p."""
    entropy: float
    """Weighted mean entropy of omega, nats."""


@dataclass(frozen=True)
class ObjectiveMetrics:
    """Holds everything that one call reports, the same on every rank."""

    value: float
    """J over all ranks."""
    effective_sample_size: float
    """(sum mu r)^2 / (sum mu * sum mu r^2), in (0, 1]."""
    ratio: RatioMetrics
    token: TokenMetrics
    levels: tuple[LevelMetrics, ...]
    expert: ExpertMetrics | None

    def as_dict(self) -> dict[str, float]:
        """Return flat names for a metrics line."""
        return dict(self._items())

    def _items(self) -> Iterator[tuple[str, float]]:
        yield "objective/value", self.value
        yield "effective_sample_size", self.effective_sample_size
        yield "ratio/mean", self.ratio.mean
        yield "ratio/p99", self.ratio.p99
        yield "ratio/max", self.ratio.max
        yield "token/count", self.token.count
        yield "token/weight", self.token.weight
        yield "token/clip_share", self.token.clip_share
        for name in ("trajectories_none_clipped", "trajectories_some_clipped", "trajectories_all_clipped"):
            share = getattr(self.token, name)
            if share is not None:
                yield f"token/{name}", share
        for level in self.levels:
            yield from _level_items(level)
        if self.expert is not None:
            for label, values in (("mass", self.expert.mass), ("drift", self.expert.drift)):
                for partition, value in enumerate(values):
                    yield f"expert/{label}/p{partition}", value
            yield "expert/entropy", self.expert.entropy


def _level_items(level: LevelMetrics) -> Iterator[tuple[str, float]]:
    head = f"gate/{level.name}"
    yield f"{head}/nodes", float(level.nodes)
    for channel, values in (("plus", level.plus), ("minus", level.minus)):
        yield f"{head}/{channel}/pass", values.passed
        yield f"{head}/{channel}/rollback", values.rollback
        yield f"{head}/{channel}/zeroed", values.zeroed
        yield f"{head}/s_{channel}/mean", values.aggregate.mean
        yield f"{head}/s_{channel}/p99", values.aggregate.p99
    yield f"{head}/base_weight/mean", level.base_weight.mean
    yield f"{head}/base_weight/p99", level.base_weight.p99
    yield f"{head}/total_variation/mean", level.total_variation.mean
    yield f"{head}/total_variation/p99", level.total_variation.p99
    for regime in ("both_pass", "one_rollback", "one_zeroed", "both_rollback", "both_zeroed"):
        yield f"{head}/regime/{regime}", getattr(level, regime)


def level_metrics(gated: GatedTree) -> tuple[LevelMetrics, ...]:
    """Return the metrics of every level from the gated node tree."""
    found = []
    for nodes, level in zip(gated.tree.levels, gated.levels, strict=True):
        passed, zeroed = level.slope == 1.0, level.slope == 0.0
        rolled = ~(passed | zeroed)
        joint = torch.stack(
            [
                passed.all(0),
                (rolled.sum(0) == 1) & (passed.sum(0) == 1),
                (zeroed.sum(0) == 1) & (passed.sum(0) == 1),
                ~passed.any(0) & rolled.any(0),
                zeroed.all(0),
            ]
        )
        regimes = _means(joint)
        shares = [_means(torch.stack([passed[c], rolled[c], zeroed[c]])) for c in (PLUS, MINUS)]
        plus, minus = (
            ChannelMetrics(shares[c][0], shares[c][1], shares[c][2], spread(nodes.aggregate[c])) for c in (PLUS, MINUS)
        )
        size = nodes.mass.shape[0]
        variation = (nodes.aggregate[PLUS] - nodes.aggregate[MINUS]).abs().mul(0.5).sqrt()
        weights, variations = spread(level.log_weight.exp()), spread(variation)
        found.append(LevelMetrics(nodes.level.name, size, plus, minus, weights, variations, *regimes))
    return tuple(found)


def spread(values: Tensor) -> Spread:
    """Return mean and 99th percentile (nearest rank) of node values; zeros without nodes."""
    size = values.shape[0]
    if size == 0:
        return Spread(0.0, 0.0)
    rank = math.ceil(0.99 * size)
    return Spread(float(values.mean()), float(values.kthvalue(rank).values))


def _means(flags: Tensor) -> list[float]:
    size = max(1, flags.shape[-1])
    return [float(value) / size for value in flags.sum(-1).tolist()]
