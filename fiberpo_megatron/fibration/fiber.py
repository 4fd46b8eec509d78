"""Define the fibred objectives: FiberPO, FiberPO-Domain, both objectives with expert partitions and any nested
chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fiberpo_megatron.fibration.budgets import Budget, check_names
from fiberpo_megatron.fibration.exact import Range
from fiberpo_megatron.fibration.gates import GatedTree, adjoint, gate_tree, received_by_level
from fiberpo_megatron.fibration.levels import EXPERT_KEY, Branch, Choice, LevelTree, make_tree
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.objective import Objective
from fiberpo_megatron.fibration.options import Advice, Epsilon, epsilon_advice, epsilon_pair
from fiberpo_megatron.fibration.ratio_clip import check_dual_clip
from fiberpo_megatron.fibration.registry import register
from fiberpo_megatron.fibration.rule import Chunk, Clip, GatedChunk, Gating, equal
from fiberpo_megatron.fibration.tokens import TokenBatch
from fiberpo_megatron.fibration.tree import NODE_RANGES, build_tree

UNBOUNDED = 1e30

DEFAULT_BUDGETS: Mapping[str, Budget] = {
    "trajectory+expert": (0.12, 0.10),
    "trajectory": (0.12, 0.10),
    "prompt_group": (0.08, 0.06),
    "prompt_group+expert": (0.08, 0.06),
    "domain": (0.06, 0.05),
    "domain+expert": (0.06, 0.05),
    "expert": (0.06, 0.05),
}
"""(C+, C-) per level name, in mean |log ratio|: a choice of this project, see docs/fibration.md."""


@register("fiberpo")
@dataclass(frozen=True)
class FiberPO(Objective):
    """Gates the drift at every level of a chain and clips each token's own deviation (arXiv:2604.03044, equation 2)."""

    epsilon: float | Sequence[float] | Mapping[str, float] = 0.05
    """Width of the token clip, in log ratio: one number, or {high = for positive advantages, low = for all others}; a
    pair is (high, low)."""
    budgets: Mapping[str, Sequence[float] | Mapping[Any, Any]] | None = None
    """The pair (C+, C-) of each level, in mean |log ratio|, by the level's name (its keys joined by "+"; in a tree
    BRANCH:KEYS where branches do not share it). In place of a pair, a table of pairs by the ids of one key of the level
    or of a coarser one: {"by" = KEY, "*" = pair of all others, ID = pair}. A level that is not listed takes its
    default; one that has none must be listed."""
    levels: Sequence[Sequence[str]] | Mapping[Any, Any] | None = None
    """A nested chain of levels, fine to coarse, each a list of keys; or a tree of chains by the ids of one key:
    {"by" = KEY, "*" = chain of all others, ID = chain}. Unset: the objective's own."""
    names: Mapping[str, Mapping[str, int]] | None = None
    """Names of ids, by key, which tables of budgets and levels may use, and metrics then do. A run gives those of its
    domains."""
    expert_membership: Literal["soft", "hard"] | None = None
    """How a token belongs to expert partitions: "soft" by its routing shares, "hard" to its largest share alone. Unset:
    soft. Only a chain with the key "expert" reads it."""
    dual_clip: float | None = None
    """Bound c > 1: tokens with A < 0 and x > 0 use max(r A, c A) on the raw ratio. Together with `pessimistic`, the
    objective of tokens with A < 0 is at least c A. Unset: no bound."""
    unclip_positive: bool = False
    """Whether tokens with A > 0 and x < 0 use r A on the raw ratio."""
    pessimistic: bool = False
    """Whether a token's objective is the smaller one of G A and r A, as in PPO, so that a token that was pushed to the
    wrong side keeps its gradient. A token that takes r A counts in the aggregates and hands no adjoint to them."""
    k_max: float | None = None
    """Largest k of a gate, at least 1: a node of more tokens has this slope in rollback, and its gate reaches zero at
    (1 + 1/k_max) C. It bounds by what factor rollback multiplies a node's gradient. Unset: k is the number of
    tokens."""

    default_levels: ClassVar[tuple[tuple[str, ...], ...]] = (("trajectory",),)
    """The levels that `levels` replaces."""
    paper = "arXiv:2603.08239"
    kernel = "fiberpo_megatron.fibration.kernels.formulas:FIBER"
    node_terms = 4
    adjoint_terms = 3

    @cached_property
    def bounds(self) -> Epsilon:
        """Return the width of the token clip (for positive, for non-positive advantage)."""
        return epsilon_pair(self.epsilon)

    @cached_property
    def tree(self) -> LevelTree:
        """Return the checked levels with their budgets."""
        return make_tree(
            self.default_levels if self.levels is None else self.levels,
            self.budgets,
            defaults=DEFAULT_BUDGETS,
            names=self.names or {},
            soft=self.expert_membership != "hard",
        )

    def check(self) -> None:
        """Refuse levels that cannot nest, budgets that do not fit them, and bounds that are not positive."""
        check_dual_clip(self.dual_clip)
        check_names(self.names or {})
        if self.k_max is not None and self.k_max < 1.0:
            raise ValueError(
                f"objective {self.name!r}: k_max is {self.k_max}; the slope of a gate cannot be below that of a node "
                "of one token, so choose a number of 1 or more, or leave it unset for no bound"
            )
        if self.pessimistic and self.unclip_positive:
            raise ValueError(
                f"objective {self.name!r}: `pessimistic` already uses r A where A > 0 and r is the smaller ratio; "
                "remove `unclip_positive`"
            )
        if self.expert_membership is not None and not self.tree.uses_experts:
            raise ValueError(
                f"objective {self.name!r} has no level with the key 'expert' and does not read 'expert_membership'; "
                "remove it, or add 'expert' to a level"
            )
        _ = self.tree, self.bounds

    def advice(self, given: Mapping[str, Any]) -> list[Advice]:
        """Return which budgets have C- >= C+, which levels' delta is not well above the width of the token clip, and
        whether that is a bare pair."""
        found = epsilon_advice(given, type(self).epsilon)
        own = given.get("budgets") or {}
        for level in self.tree.levels:
            for plus, minus in level.budget.all if level.name in own else ():
                if minus >= plus:
                    text = (
                        "C_minus is not below C_plus; lower it, because the KL bias makes S_minus the larger aggregate"
                    )
                    found.append(Advice("budgets", level.name, (plus, minus), text))
        width = max(self.bounds)
        tightest = {level.name: min(level.budget.all, key=sum) for level in self.tree.levels}
        tight = {name: budget for name, budget in tightest.items() if width > 0.5 * sum(budget)}
        if tight and "epsilon" in given:
            levels = ", ".join(f"{name!r} ({sum(budget):g})" for name, budget in tight.items())
            text = f"it is not well below delta = C_plus + C_minus of level {levels}; lower it to at most half of delta"
            found.append(Advice("epsilon", None, self.epsilon, f"{text}, or raise the budgets"))
        elif own.keys() & tight.keys():
            name = min(own.keys() & tight.keys(), key=lambda name: (sum(tight[name]), name))
            text = (
                f"delta = C_plus + C_minus is less than twice epsilon = {width:g}; raise the budget, or lower epsilon"
            )
            found.append(Advice("budgets", name, tight[name], text))
        return found

    @property
    def base_keys(self) -> tuple[str, ...]:
        """Return the keys of the finest level, without "expert"."""
        return self.tree.base_keys

    @property
    def parent_keys(self) -> tuple[str, ...]:
        """Return the keys that only coarser levels name."""
        return self.tree.parent_keys

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Return the different chains of the tree."""
        return self.tree.branches

    @property
    def branch_choice(self) -> Choice | None:
        """Return which token follows which chain; None if all follow one."""
        return self.tree.choice

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the names of the levels, fine to coarse."""
        return tuple(level.name for level in self.tree.levels)

    @property
    def uses_experts(self) -> bool:
        """Return whether a level has the key "expert"."""
        return self.tree.uses_experts

    @property
    def soft(self) -> bool:
        """Return whether tokens belong to expert partitions by their shares."""
        return self.tree.soft

    @property
    def spans_micro_batches(self) -> bool:
        """Return whether a node of some level holds tokens of several trajectories."""
        return not self.tree.inside_trajectory

    def check_batch(self, batch: TokenBatch) -> None:
        """Refuse budgets and branches of ids that the call's `counts` or expert partitions do not have."""
        for key, listed in self.tree.listed().items():
            count = batch.partitions if key == EXPERT_KEY else (batch.counts or {}).get(key)
            if count is not None and key not in batch.labels and listed and max(listed) >= count:
                raise ValueError(
                    f"budgets or levels of objective {self.name!r} list {key} {max(listed)}, but its ids run from 0 to "
                    f"{count - 1}; remove the entry, or correct it"
                )

    @property
    def term_ranges(self) -> tuple[Range, ...]:
        """Return the ranges of mu, 1, mu x+ and mu x-."""
        return NODE_RANGES

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Return mu, 1, mu x+ and mu x-: what equation 3 of arXiv:2604.03044 averages, per channel."""
        x, mu = chunk.log_ratio, chunk.weights
        return mu, chunk.counted, x.clamp(min=0.0).mul_(mu), x.clamp(max=0.0).mul_(mu).neg_()

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> FiberGating:
        """Return the gates of every node. Raises ValueError, on every rank alike, where levels do not nest."""
        assert nodes is not None and sums is not None
        gated = gate_tree(build_tree(self.tree, nodes, sums, parents), self.k_max)
        return FiberGating(self, gated, (nodes.base_nodes, nodes.partitions), like)


@register("fiberpo-domain")
@dataclass(frozen=True)
class FiberPODomain(FiberPO):
    """Is FiberPO with gates on trajectories, prompt groups and domains (FiberPO-Domain, arXiv:2603.08239)."""

    default_levels = (("trajectory",), ("prompt_group",), ("domain",))
    kernel = FiberPO.kernel


@register("fiberpo-expert")
@dataclass(frozen=True)
class FiberPOExpert(FiberPO):
    """Is FiberPO-Domain below which each trajectory's expert partitions have gates of their own."""

    default_levels = (("trajectory", "expert"), ("trajectory",), ("prompt_group",), ("domain",))
    kernel = FiberPO.kernel


@register("fiberpo-expert-global")
@dataclass(frozen=True)
class FiberPOExpertGlobal(FiberPO):
    """Is FiberPO-Domain with one chain of gates per expert partition, up to the partition as a whole."""

    default_levels = (("trajectory", "expert"), ("prompt_group", "expert"), ("domain", "expert"), ("expert",))
    kernel = FiberPO.kernel


class FiberGating(Gating):
    """Holds one call's gates; per finest node S+, S- and the summed log base weight."""

    gated_tree: GatedTree
    node_values: Tensor

    def __init__(self, rule: FiberPO, gated: GatedTree, shape: tuple[int, int], like: Tensor) -> None:
        self.rule = rule
        self.gated_tree = gated
        self.shape = shape
        self.dtype = like.dtype
        finest = torch.cat([gated.tree.finest_aggregate(), gated.log_weight.unsqueeze(0)])
        self.node_values = self._dense(finest)

    def _dense(self, finest: Tensor) -> Tensor:
        return self.gated_tree.tree.dense(finest).view(-1, *self.shape).to(self.dtype)

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        """Return G with log G = clip(x - l S_same) - clip(-l S_opp) + sum of log base weights (equation 2)."""
        s_plus, s_minus, log_weight = values
        p, q = chunk.positive, chunk.negative
        # l S_same and -l S_opp without branches: one of the two products is exactly zero.
        own = self._residual(chunk, s_plus, s_minus)
        other = (q * s_plus).sub_(p * s_minus)
        own_clipped, other_clipped = self._clip(own, chunk), self._clip(other, chunk)
        own_free, other_free = equal(own_clipped, own), equal(other_clipped, other)
        log_ratio = own_clipped.sub_(other_clipped).add_(log_weight)
        beyond = self._pessimistic(chunk, log_ratio) if self.rule.pessimistic else None
        ratio = log_ratio.exp_()
        scale = chunk.scale
        weight = scale * ratio
        gradient, free = weight * own_free, own_free
        if beyond is not None:
            on_raw, bounded = beyond
            ratio = torch.where(on_raw, chunk.ratio, ratio)
            gradient = torch.where(on_raw, scale * chunk.ratio, gradient)
            free, weight = free.masked_fill(on_raw, 1.0), weight.masked_fill(on_raw, 0.0)
            if self.rule.dual_clip is not None:
                ratio = ratio.masked_fill(bounded, self.rule.dual_clip)
                gradient, free = gradient.masked_fill(bounded, 0.0), free.masked_fill(bounded, 0.0)
                weight = weight.masked_fill(bounded, 0.0)
        elif self.rule.dual_clip is not None or self.rule.unclip_positive:
            ratio, gradient, free, weight = self._overlay(chunk, scale, ratio, gradient, free, weight)
        # What stops S+'s gradient: a token's own clip where x >= 0, else its other clip; S- the other way.
        stopped_plus = weight - (p * own_free).addcmul_(q, other_free).mul_(weight)
        stopped_minus = weight - (p * other_free).addcmul_(q, own_free).mul_(weight)
        return GatedChunk(ratio, gradient, free, (weight, stopped_plus, stopped_minus))

    def clip(self, chunk: Chunk, values: list[Tensor]) -> Clip:
        """Return the bounds of the residual x - l S_same, or of the ratio for tokens that use it as it is."""
        s_plus, s_minus, log_weight = values
        own, (gain, loss), dual = self._residual(chunk, s_plus, s_minus), self.rule.bounds, self.rule.dual_clip
        good, bad = chunk.advantages > 0, chunk.advantages < 0
        bound = torch.full_like(own, loss).masked_fill(good, gain)
        upper = bound.masked_fill(bad, math.inf) if dual is not None and not self.rule.pessimistic else bound
        value = chunk.ratio
        if self.rule.pessimistic:
            other = (chunk.negative * s_plus).sub_(chunk.positive * s_minus)
            log_ratio = self._clip(own, chunk).sub_(self._clip(other, chunk)).add_(log_weight)
            on_raw, bounded = self._pessimistic(chunk, log_ratio)
            on_raw, value = on_raw | (bounded & bad), torch.where(bad, torch.maximum(log_ratio.exp(), value), value)
        else:
            on_raw = torch.zeros_like(good)
            if dual is not None:
                on_raw |= bad & (chunk.log_ratio > 0)
            if self.rule.unclip_positive:
                on_raw |= good & (chunk.log_ratio < 0)
        most = torch.full_like(own, math.inf).masked_fill(bad, math.inf if dual is None else dual)
        return Clip(
            ("residual", "ratio"),
            on_raw.long(),
            torch.where(on_raw, value, own),
            (-bound).masked_fill(on_raw, -math.inf),
            torch.where(on_raw, most, upper),
        )

    def _residual(self, chunk: Chunk, s_plus: Tensor, s_minus: Tensor) -> Tensor:
        return chunk.log_ratio - (chunk.positive * s_plus).sub_(chunk.negative * s_minus)

    def _clip(self, value: Tensor, chunk: Chunk) -> Tensor:
        gain, loss = self.rule.bounds
        lifted = self.rule.dual_clip is not None and not self.rule.pessimistic
        if gain == loss and not lifted:
            return value.clamp(-gain, gain)
        positive = torch.gt(chunk.advantages, 0.0, out=torch.empty_like(value))
        bound = positive * gain + (1.0 - positive) * loss
        upper = bound
        if lifted:
            upper = bound + UNBOUNDED * (chunk.advantages < 0).to(self.dtype)
        return torch.minimum(torch.maximum(value, -bound), upper)

    def _pessimistic(self, chunk: Chunk, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens have r A < G A, and which have less than c A: compared by logarithms, where ties go to G."""
        x, advantages = chunk.log_ratio, chunk.advantages
        bad = advantages < 0
        on_raw = ((advantages > 0) & (x < log_ratio)) | (bad & (x > log_ratio))
        if self.rule.dual_clip is None:
            return on_raw, on_raw
        return on_raw, bad & (torch.maximum(x, log_ratio) > math.log(self.rule.dual_clip))

    def _overlay(
        self, chunk: Chunk, scale: Tensor, ratio: Tensor, gradient: Tensor, free: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens on the raw ratio leave the fibration: they hand nothing to the aggregates."""
        x, advantages = chunk.log_ratio, chunk.advantages
        raw = chunk.ratio
        on_raw = torch.zeros_like(x, dtype=torch.bool)
        raw_gated = raw
        if self.rule.dual_clip is not None:
            on_raw |= (advantages < 0) & (x > 0)
            raw_gated = torch.where(on_raw, raw.clamp(max=self.rule.dual_clip), raw)
        if self.rule.unclip_positive:
            on_raw |= (advantages > 0) & (x < 0)
        raw_free = (raw_gated == raw).to(self.dtype)
        return (
            torch.where(on_raw, raw_gated, ratio),
            torch.where(on_raw, scale * raw * raw_free, gradient),
            torch.where(on_raw, raw_free, free),
            weight.masked_fill(on_raw, 0.0),
        )

    def adjoint(self, sums: Tensor) -> Tensor:
        flat = sums.reshape(3, -1).index_select(1, self.gated_tree.tree.index)
        self.received = received_by_level(self.gated_tree, flat[0], flat[1:])
        return self._dense(adjoint(self.gated_tree, self.received))

    def finish(self, chunk: Chunk, values: list[Tensor]) -> Tensor:
        received_plus, received_minus = values
        return (chunk.positive * received_plus).add_(chunk.negative * received_minus).mul_(chunk.weights)
