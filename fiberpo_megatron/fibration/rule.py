"""What an objective must say about itself; the engine does the passes over tokens.

A `Rule` is the objective's configuration. Per call it yields a `Gating`, which knows the reduced node
sums. Both work on `Chunk`s: [n] tokens at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fiberpo_megatron.fibration.gates import GatedTree
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.runs import RunSlice

Epsilon = tuple[float, float]
"""(positive advantage, non-positive advantage); for ratio clips this is (upper, lower)."""


@dataclass(frozen=True)
class Chunk:
    """Some of this rank's tokens, all [n]; `log_ratio` is clamped."""

    tokens: slice
    runs: RunSlice
    log_ratio: Tensor
    advantages: Tensor
    weights: Tensor
    any_weightless: bool

    @cached_property
    def positive(self) -> Tensor:
        """1 where log_ratio >= 0, else 0: zero belongs to the positive channel."""
        return torch.ge(self.log_ratio, 0.0, out=torch.empty_like(self.log_ratio))

    @cached_property
    def negative(self) -> Tensor:
        return 1.0 - self.positive

    @cached_property
    def counted(self) -> Tensor | None:
        """1 for tokens that count: one of weight 0 is not in the objective's sum. None when all count."""
        return (self.weights > 0).to(self.weights.dtype) if self.any_weightless else None

    def only_counted(self, value: Tensor) -> Tensor:
        """`value` (changed in place), zero at tokens that do not count."""
        return value if self.counted is None else value.mul_(self.counted)

    @cached_property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()


@dataclass(frozen=True)
class GatedChunk:
    """Result for one chunk, all [n]."""

    ratio: Tensor
    """Gated ratio G."""
    gradient: Tensor
    """The direct term of dJ/dx."""
    free: Tensor
    """1 where the token's own clip lets the gradient through, 0 where it is clipped."""
    node_terms: tuple[Tensor, ...] = ()
    """Values to sum per finest node for the second reduction."""


class Gating(ABC):
    """One call's gating, after the first reduction."""

    node_values: Tensor | None = None
    """[C, base_nodes, P], handed to tokens in `gate`; None when the rule has no nodes."""
    gated_tree: GatedTree | None = None
    """Set by rules with gated levels; read by the metrics."""

    @abstractmethod
    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        """Gated ratio and direct gradient of a chunk."""

    def adjoint(self, sums: Tensor) -> Tensor | None:
        """Node values for `finish` from the second reduction's sums [C, base_nodes, P]; None for no terms."""
        return None

    def finish(self, chunk: Chunk, values: list[Tensor]) -> Tensor:
        """The gradient that reaches tokens through aggregates, [n]: none in a rule without adjoints."""
        return torch.zeros_like(chunk.log_ratio)


class Rule(ABC):
    """Configuration of one objective."""

    base_keys: tuple[str, ...] = ()
    """Keys of the finest node (without the expert partition)."""
    parent_keys: tuple[str, ...] = ()
    """Keys only coarser levels name."""
    level_names: tuple[str, ...] = ()
    has_nodes: bool = False
    uses_experts: bool = False
    soft: bool = True
    spans_micro_batches: bool = False
    node_terms: int = 0
    """Number of node sums in the first reduction."""
    adjoint_terms: int = 0
    """Number of node sums in the second reduction."""

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Token values to sum per finest node for the first reduction; None stands for ones."""
        return ()

    @abstractmethod
    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        """Gating from the reduced node sums [C, base_nodes, P]; `like` gives the tokens' dtype."""


def equal(left: Tensor, right: Tensor) -> Tensor:
    """1 where equal, else 0, in the tensors' dtype (several times faster than a boolean and a cast)."""
    return torch.eq(left, right, out=torch.empty_like(left))


def pessimistic_clip(ratio: Tensor, advantages: Tensor, epsilon: Epsilon, dual_clip: float | None = None) -> Tensor:
    """G of min(r A, clip(r, 1 - e_low, 1 + e_high) A) = G A (PPO, arXiv:1707.06347 equation 7).

    With A >= 0 only the upper bound can bind, with A < 0 only the lower one; `dual_clip` c bounds the
    latter by max(., c A) (arXiv:1912.09729 equation 5).
    """
    upper, lower = 1.0 + epsilon[0], 1.0 - epsilon[1]
    gain = torch.ge(advantages, 0.0, out=torch.empty_like(advantages))
    loss = 1.0 - gain
    below = ratio.clamp(min=lower, max=dual_clip)
    return ratio.clamp(max=upper).mul_(gain).add_(below.mul_(loss))
