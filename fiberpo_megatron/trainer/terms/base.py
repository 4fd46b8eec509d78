"""This module says what a term is: something that a run adds to its objective, and how it takes part in a step.

A term is asked at five places of a training step:

    prepare        once, after the pass of the old log-probs: it may replace advantages and weights of mini-batches
    mask           in every call of the gate, before the objective: factors of the tokens' weights
    coefficients   in every call of the gate: what it adds to dJ/dlogpi, and dJ/dH of every token
    update         once, after the last optimiser step: it may move what it keeps (an adaptive coefficient)
    state          when a checkpoint is written; `restore` takes it back

Means are over a whole mini-batch and all ranks: a term multiplies by the weights mu, which sum to 1 over them, and
never divides by what one rank or one micro-batch holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.trainer.batch import MiniBatch
from fiberpo_megatron.types import RolloutBatch, TokenScores


@dataclass(frozen=True)
class StepStart:
    """Holds what is known when the first optimiser step of a training step is about to begin."""

    parts: Sequence[MiniBatch]
    """The step's mini-batches, with the reference's and the teacher's log-probs where a term needs them."""
    scores: Sequence[TokenScores]
    """Old log-probs and entropies of each part's tokens."""
    rollouts: RolloutBatch
    """All trajectories of the step, equal on every rank."""
    layout: Layout


@dataclass(frozen=True)
class Prepared:
    """Holds what `Term.prepare` returns."""

    parts: list[MiniBatch]
    """The mini-batches, in order, with what the term has replaced in them."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics over all ranks."""


@dataclass(frozen=True)
class GateTokens:
    """Holds this rank's response tokens [n] of one call of the gate, on the gate's device.

    A call is about all of the rank's tokens of a mini-batch or, where the step is a single pass, about one
    micro-batch's.
    """

    log_probs: Tensor
    """float32 [n], without gradient"""
    old_log_probs: Tensor
    """float32 [n]"""
    advantages: Tensor
    """float32 [n]"""
    weights: Tensor
    """float64 [n] mu, in `mask` with the factors of the masks before it. `coefficients` gets those of the mini-batch: a
    mask is about the objective, and not about what is added to it."""
    rollout_log_probs: Tensor
    """float32 [n]"""
    reference_log_probs: Tensor | None
    """float32 [n]"""
    teacher_log_probs: Tensor | None
    """float32 [n]"""
    keys: Mapping[str, Tensor]
    """int64 [n] per key"""
    counts: Mapping[str, int]
    """Number of ids of each key over all ranks."""
    values: Mapping[str, Tensor]
    """[n] by name, of `MiniBatch.term_values`"""
    reduce: Callable[[Tensor], Tensor] | None
    """Sum of a float64 tensor over the ranks that hold the other tokens; None in a single pass."""


@dataclass(frozen=True)
class Mask:
    """Holds what `Term.mask` returns."""

    factor: Tensor
    """[n] by which the tokens' weights are multiplied."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Metrics by name, as in `Contribution`."""


@dataclass(frozen=True)
class Contribution:
    """Holds what a term adds to the objective at this rank's tokens of one call."""

    gradient: Tensor | None = None
    """[n] added to dJ / d log pi(a_j)."""
    entropy: Tensor | None = None
    """[n] added to dJ / dH_j."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Metrics by name, float64 scalars: this rank's shares, whose sum over all ranks and calls is the metric. A sum
    over mu_j times a value is the value's mean. Every rank and call has the same names."""


class Term:
    """This is the base class of terms: it adds nothing. A term overrides what it takes part in.

    All methods but `update`, `state` and `restore` are called on the last pipeline stage alone.
    """

    name: ClassVar[str]
    """Name in the config (`algorithm.NAME`) and in checkpoints."""
    needs_reference: ClassVar[bool] = False
    """Whether it reads `reference_log_probs`; where the rollouts do not bring them, another forward pass does."""
    spans_micro_batches: bool = False
    """Whether a token's mask or coefficient depends on tokens of other trajectories, so that a single pass is wrong. A
    trajectory itself is never cut in a single pass."""

    def prepare(self, step: StepStart) -> Prepared:
        """Return the step's mini-batches with what the term replaces in them."""
        return Prepared(list(step.parts))

    def mask(self, tokens: GateTokens) -> Mask | None:
        """Return factors of the tokens' weights, or None for a term that masks nothing."""
        return None

    def coefficients(self, tokens: GateTokens) -> Contribution:
        """Return what the term adds at these tokens. A call whose tensors are empty has the same `sums`, as zeros."""
        return Contribution()

    def update(self, metrics: Mapping[str, float], trajectories: int) -> None:
        """Take the training step's metrics and its number of trajectories. The last stage's logging rank decides: all
        ranks then take its `state`."""

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps of the term; empty for a term that keeps nothing."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take back what `state` returned."""
