"""Declare the arithmetic that an objective brings; `passes` runs it over the tokens of a call.

A `Rule` holds an objective's options. For each call it yields a `Gating`, which knows the node sums of all ranks. Both
see the tokens as `Chunk`s of n tokens at a time. `objective.Objective` is the rule with everything that callers use.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fiberpo_megatron.fibration.exact import LARGEST_ADVANTAGE, Range
from fiberpo_megatron.fibration.gates import GatedTree
from fiberpo_megatron.fibration.levels import Branch, Choice
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.runs import RunSlice
from fiberpo_megatron.fibration.tokens import MAX_LOG_RATIO, TokenBatch

WEIGHTINGS = ("seq-mean", "token-mean", "seq-sum", "constant")
"""Kinds of token weights, of a mini-batch with B trajectories of T_i tokens: 1/(B T_i), 1/(sum of T), 1/B, and 1/(B L)
with a constant L. The first two sum to 1."""


@dataclass(frozen=True)
class Chunk:
    """Holds n of this rank's tokens; every tensor is [n], in the dtype of the call's log ratio.

    An objective must not change these tensors in place.
    """

    tokens: slice
    """Where these tokens stand among the rank's tokens."""
    runs: RunSlice
    """How these tokens fall into stretches of equal ids."""
    log_ratio: Tensor
    """x = log pi_theta - log pi_old, clamped to +-`Rule.max_log_ratio`."""
    advantages: Tensor
    """A."""
    weights: Tensor
    """mu; a token of weight 0 is not in the objective's sum."""
    any_weightless: bool
    """Whether any of the rank's tokens has weight 0."""
    old_log_probs: Tensor | None = None
    """log pi_old; None unless the objective `reads_old_log_probs`."""

    @cached_property
    def ratio(self) -> Tensor:
        """Return r = exp(x), the importance ratio."""
        return self.log_ratio.exp()

    @cached_property
    def scale(self) -> Tensor:
        """Return mu A, the gradient of a token while nothing has moved."""
        return self.weights * self.advantages

    @cached_property
    def positive(self) -> Tensor:
        """Return 1 where log_ratio >= 0, else 0: zero belongs to the positive channel."""
        return torch.ge(self.log_ratio, 0.0, out=torch.empty_like(self.log_ratio))

    @cached_property
    def negative(self) -> Tensor:
        """Return 1 where log_ratio < 0, else 0."""
        return 1.0 - self.positive

    @cached_property
    def counted(self) -> Tensor | None:
        """Return 1 for tokens that count, 0 for tokens of weight 0; None when all tokens count."""
        return (self.weights > 0).to(self.weights.dtype) if self.any_weightless else None

    def only_counted(self, value: Tensor) -> Tensor:
        """Set `value` [n] to zero, in place, at tokens of weight 0, and return it."""
        return value if self.counted is None else value.mul_(self.counted)


@dataclass(frozen=True)
class GatedChunk:
    """Holds what an objective computed for one chunk; every tensor is [n]."""

    ratio: Tensor
    """Gated ratio G; the objective's value is the sum of mu A G."""
    gradient: Tensor
    """The direct term of dJ/dx: mu A dG/dx with the node sums held fixed."""
    free: Tensor | None = None
    """1 where the token's own clip lets its gradient through, 0 where the token is clipped (for the metrics). None:
    the objective clips no token."""
    node_terms: tuple[Tensor, ...] = ()
    """Values to sum per finest node in the second reduction, `adjoint_terms` of them. An empty tuple says
    that all are zero."""


@dataclass(frozen=True)
class Clip:
    """Holds the bounds of the clip of n tokens, for people who ask why a token did not learn; every tensor is [n]."""

    figures: tuple[str, ...]
    """Names of what a clip may bound, such as "ratio"."""
    figure: Tensor
    """int64: which of the names it is for each token."""
    value: Tensor
    """The figure of each token before the clip."""
    low: Tensor
    """The smallest value that the clip lets through; -inf where there is no such bound."""
    high: Tensor
    """The largest one; inf where there is no such bound."""

    @classmethod
    def of(cls, name: str, value: Tensor, low: Tensor | float, high: Tensor | float) -> Clip:
        """Return the clip of one figure; a bound may be one number for all tokens."""
        ends = (torch.as_tensor(end, dtype=value.dtype, device=value.device).expand_as(value) for end in (low, high))
        return cls((name,), torch.zeros_like(value, dtype=torch.int64), value, *ends)


class Gating(ABC):
    """Gates the tokens of one call, once the first reduction has summed the nodes over all ranks."""

    node_values: Tensor | None = None
    """[C, base_nodes, P] values that `gate` receives for each token's node; None when the rule has no nodes."""
    gated_tree: GatedTree | None = None
    """The gates of every level, which the metrics read; None when the rule has no gated levels."""
    received: list[Tensor] | None = None
    """What tokens receive through each gated level (`gates.received_by_level`), once `adjoint` was called."""

    @abstractmethod
    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        """Return the gated ratio and the direct gradient of a chunk; `values` are C tensors [n], from `node_values`."""

    def clip(self, chunk: Chunk, values: list[Tensor]) -> Clip | None:
        """Return the bounds of each token's own clip, for records of single tokens (`explain`); `values` as in `gate`.

        None says that the objective clips no token, or names no bounds.
        """
        return None

    def adjoint(self, sums: Tensor) -> Tensor | None:
        """Return node values [C, base_nodes, P] for `finish`, from the second reduction's sums of the same shape.

        None says that no gradient reaches tokens through node sums.
        """
        return None

    def finish(self, chunk: Chunk, values: list[Tensor]) -> Tensor:
        """Return the gradient [n] that reaches tokens through node sums; `values` are C tensors [n], from `adjoint`."""
        return torch.zeros_like(chunk.log_ratio)


class Rule(ABC):
    """Declares what the passes over tokens ask of an objective. Derive from `Objective`, which adds the call.

    An objective with node sums sets `base_keys`, `node_terms` and, if gradients pass through the sums, `adjoint_terms`,
    and defines `terms` and `prepare`. The expert membership and chains of gated levels belong to `FiberPO`.
    """

    name: ClassVar[str]
    """Short name; an objective that is not registered has its class's name."""
    kernel: ClassVar[str | None] = None
    """Import path "module:NAME" of the `Formulas` that compute this objective in fused Triton kernels. None: the call
    runs in torch on every device. A subclass does not inherit it, because its arithmetic may differ: it repeats the
    path if its arithmetic is the same."""
    exact_sums: bool
    """Whether sums over nodes are exact; see `Objective`."""
    node_terms: ClassVar[int] = 0
    """Number of values that the first reduction sums per node; 0 for an objective without node sums."""
    adjoint_terms: ClassVar[int] = 0
    """Number of values that the second reduction sums per node."""
    lone_nodes: ClassVar[bool] = False
    """Whether an id of -1 says that a token is alone in its node, which then takes no room in the tables of the
    reductions. All such tokens share one more node, the last, whose sums arrive as NaN. Such an objective has one base
    key."""
    max_log_ratio: ClassVar[float] = MAX_LOG_RATIO
    """Log ratios are clamped to plus and minus this; a token beyond has the gradient zero. At most 80."""
    reads_old_log_probs: ClassVar[bool] = False
    """Whether a call must pass `old_log_probs`, because the gate depends on probabilities and not on ratios alone."""
    paper: ClassVar[str | None] = None
    """Where `weighting`, `advantage` and `normalise_std` come from; None for an objective whose paper names none. A run
    says so once when its config overrides what a paper has."""
    weighting: ClassVar[str] = "seq-mean"
    """The token weights mu that the objective's paper has, one of `WEIGHTINGS`; a run takes them unless its config sets
    `algorithm.weighting`."""
    advantage: ClassVar[str | None] = None
    """Short name of the advantage estimator that the paper has. A run takes it, or "group-mean" for None, unless its
    config sets `algorithm.advantage`."""
    normalise_std: ClassVar[bool | None] = None
    """Whether the paper divides advantages by the group's standard deviation. A run does so, for None as well, unless
    its config sets `algorithm.normalise_std`."""

    @property
    def value_range(self) -> Range:
        """Return the range of mu A G, whose sum is J: mu up to 1, |A| up to 1e3, G up to exp(`max_log_ratio`)."""
        return Range.covering(LARGEST_ADVANTAGE * math.exp(self.max_log_ratio))

    @property
    def term_ranges(self) -> tuple[Range, ...]:
        """Return the range of each of the `node_terms` values that `terms` returns (`exact.Range`).

        Sums over nodes take as much room as their ranges need. The default holds mu A r, and all that is smaller.
        """
        return (self.value_range,) * self.node_terms

    @property
    def adjoint_ranges(self) -> tuple[Range, ...]:
        """Return the range of each of the `adjoint_terms` values that a chunk hands on; the default holds mu A r."""
        return (self.value_range,) * self.adjoint_terms

    @property
    def base_keys(self) -> tuple[str, ...]:
        """Return the keys that name the finest node, without "expert".

        A class may simply set it: `base_keys = ("turn",)`.
        """
        return ()

    @property
    def parent_keys(self) -> tuple[str, ...]:
        """Return the keys that only coarser levels name, in some branch."""
        return ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Return the chains that tokens may follow; one without a tree of levels."""
        return (Branch((), self.base_keys, self.parent_keys, self.uses_experts),)

    @property
    def branch_choice(self) -> Choice | None:
        """Return which token follows which of `branches`; None if all follow the first."""
        return None

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys that a call must pass, base keys first; "expert" apart (see `uses_experts`)."""
        choice = () if self.branch_choice is None else (self.branch_choice.key,)
        return tuple(dict.fromkeys((*self.base_keys, *self.parent_keys, *choice)))

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the names of the gated levels, fine to coarse; empty for an objective without gated levels."""
        return ()

    @property
    def uses_experts(self) -> bool:
        """Return whether a call needs `expert_share`."""
        return False

    @property
    def soft(self) -> bool:
        """Return whether a token belongs to expert partitions by its shares, rather than to the largest one alone."""
        return True

    def check_batch(self, batch: TokenBatch) -> None:
        """Raise ValueError for a call whose keys do not have the ids that the options name."""
        return  # options of most objectives name none

    def terms(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Return the `node_terms` values [n] that the first reduction sums per node; None stands for ones."""
        return ()

    @abstractmethod
    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        """Return the gating of one call.

        Args:
            nodes: the finest nodes; None without node sums.
            sums: what `terms` summed over all ranks, float64 [node_terms, base_nodes, P] (P = 1 without experts).
            parents: ids of the coarser levels' nodes, as `tree.parent_tables` packs them.
            like: a token tensor of the call, for the dtype that node values must have.
        """

    def blind_lone_node(self, sums: Tensor) -> Tensor:
        """Set the sums [C, base_nodes, P] of the node of all lone tokens to NaN, where there is one; return them."""
        if self.lone_nodes:
            sums[:, -1] = float("nan")
        return sums

    def require_kernel(self) -> str:
        """Return `kernel`. Raises ValueError when the objective has none."""
        if self.kernel is None:
            raise ValueError(
                f"kernels=True: objective {self.name!r} has no Triton kernel; leave kernels unset, so that it runs in "
                "torch (on a GPU too), or set the class attribute `kernel` to the import path of its formulas"
            )
        return self.kernel


def equal(left: Tensor, right: Tensor) -> Tensor:
    """Return 1 where equal, else 0, in the tensors' dtype (several times faster than a boolean and a cast)."""
    return torch.eq(left, right, out=torch.empty_like(left))
