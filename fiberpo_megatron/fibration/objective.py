"""Define the face of an objective: options, a call on plain tensors, and an autograd function for single-pass use.

An objective without node sums derives from `TokenObjective` and defines one method; one with node sums derives from
`Objective`. docs/fibration.md shows both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fiberpo_megatron.fibration.collective import Reduce
from fiberpo_megatron.fibration.evaluate import ObjectiveOutput, evaluate
from fiberpo_megatron.fibration.levels import EXPERT_KEY, TRAJECTORY_KEY, inside_trajectory
from fiberpo_megatron.fibration.membership import NodeMap
from fiberpo_megatron.fibration.options import Advice, changed_options, check_values
from fiberpo_megatron.fibration.rule import Chunk, Clip, GatedChunk, Gating, Rule
from fiberpo_megatron.fibration.tokens import make_batch, require_keys, with_lone_node
from fiberpo_megatron.user_warnings import warn_user


@dataclass(frozen=True)
class Objective(Rule):
    """Computes J = sum_i mu_i G_i A_i and its gradient in closed form; the base class of every objective.

    An objective is a frozen dataclass whose fields are its options. `build_objective("grpo", epsilon=0.1)` makes one by
    name; its own constructor does the same. `Rule` lists what a class declares and defines.
    """

    kernels: bool | None = field(default=None, kw_only=True)
    """True runs calls in fused Triton kernels, False in torch. None takes the kernels where the objective has some and
    they can run: on CUDA with Triton 3.4 or newer."""

    exact_sums: bool = field(default=True, kw_only=True)
    """Whether sums over tokens in torch are exact, so that a result has the same bits in any layout. False adds up in
    float64; docs/fibration.md has what that saves on a CPU. Kernels are always exact."""

    gradient_is_derivative: ClassVar[bool] = True
    """Whether the gradient is the derivative of the value; False for an objective with a stop-gradient, such as CISPO.
    Tests compare the gradient with finite differences accordingly."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in vars(cls):
            cls.name = cls.__name__
        if "kernel" not in vars(cls):
            cls.kernel = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.kernels:
            self.require_kernel()
        self.check()
        for advice in self.advice(changed_options(self)):
            warn_user(str(advice))

    def check(self) -> None:
        """Raise ValueError for options that do not go together. Types and finite numbers are checked before."""

    def advice(self, given: Mapping[str, Any]) -> list[Advice]:
        """Return what in the options that were given is allowed but unwise; the user sees one line each, once.

        `given` are the options that the user set: nothing is said about the numbers of a preset or default.
        """
        return []

    @property
    def spans_micro_batches(self) -> bool:
        """Return whether a token's gradient depends on tokens of other trajectories.

        If not, one pass per micro-batch is exact, as long as no trajectory is cut.
        """
        return self.node_terms > 0 and not inside_trajectory(self.base_keys)

    def missing_keys(self, supplied: Collection[str]) -> list[str]:
        """Return the keys that the objective needs and that are not among `supplied`.

        "expert" stands for expert shares: it is missing where the objective `uses_experts` and it is not supplied.
        """
        needed = (*self.keys, EXPERT_KEY) if self.uses_experts else self.keys
        return [key for key in needed if key not in supplied]

    def check_keys(self, supplied: Collection[str]) -> None:
        """Raise ValueError, naming level and key, unless `supplied` holds every key that the objective needs."""
        missing = self.missing_keys(supplied)
        if not missing:
            return
        needs = f"objective {self.name!r}"
        for level in self.level_names:
            if missing[0] in level.rpartition(":")[2].split("+"):
                needs = f"level {level!r} of objective {self.name!r}"
                break
        raise ValueError(
            f"{needs} needs the key {missing[0]!r}, which is not supplied; the keys supplied are "
            f"{', '.join(sorted(supplied)) or 'none'}; change the levels, or choose another objective"
        )

    def __call__(
        self,
        log_ratio: Tensor,
        advantages: Tensor,
        weights: Tensor,
        *,
        keys: Mapping[str, Tensor] | None = None,
        expert_share: Tensor | None = None,
        reduce: Reduce | None = None,
        counts: Mapping[str, int] | None = None,
        labels: Mapping[str, Tensor] | None = None,
        old_log_probs: Tensor | None = None,
        metrics: bool = True,
    ) -> ObjectiveOutput:
        """Return gated ratio, gradient, value and metrics of this rank's tokens.

        Args:
            log_ratio: log pi_theta - log pi_old, [N], float32 or float64; clamped to +-`max_log_ratio`.
            advantages: A, [N].
            weights: mu >= 0, [N], summing to 1 over all ranks; a token of weight 0 is not in the sum.
            keys: per key the token's global dense id, int64 or int32 [N]. "trajectory" also serves metrics. Objectives
                with `lone_nodes` take -1 for a token that is alone in its node.
            expert_share: omega [N, P], rows sum to 1; ignored unless `uses_experts`. A rank without
                tokens passes [0, P].
            reduce: sums a flat float64 tensor over the ranks that share the mini-batch, in place or by
                returning it. Called exactly twice; without metrics, as often as an objective has sums (never without
                levels, once where no gradient passes through the sums).
            counts: global number of ids per key. Without it a single rank uses its largest id + 1; ranks
                that share tables use max(1024, the next power of two), which must agree between them.
            labels: per key the number, int64 [counts[key]], by which budgets and branches name each id, the same on
                all ranks: the place of a turn in its conversation, for example. A key that has none goes by its ids.
            old_log_probs: log pi_old of each token, [N]; ignored unless the objective `reads_old_log_probs`.
            metrics: False skips the metrics; the same on all ranks.

        Raises:
            ValueError: malformed input, or levels that do not nest; names level, node, value and fix.
        """
        # A torch function mode (a default device, the CPU platform's) would be asked about each of some hundred
        # small operations, two thirds of a call's time for a thousand tokens; none has anything to say here.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            found = require_keys(keys, self.keys, self.name)
            if metrics and keys is not None and TRAJECTORY_KEY in keys:
                found[TRAJECTORY_KEY] = keys[TRAJECTORY_KEY]
            if self.uses_experts and expert_share is None:
                raise ValueError(
                    f"objective {self.name!r} has an expert level: pass expert_share [N, P], the share of each "
                    "token's routed slots per expert partition"
                )
            if self.reads_old_log_probs and old_log_probs is None:
                raise ValueError(
                    f"objective {self.name!r} reads probabilities: pass old_log_probs [N], log pi_old of each token"
                )
            batch = make_batch(
                log_ratio,
                advantages,
                weights,
                keys=found,
                counts=counts,
                expert_share=expert_share if self.uses_experts else None,
                labels={key: label for key, label in (labels or {}).items() if key in self.keys},
                old_log_probs=old_log_probs if self.reads_old_log_probs else None,
            )
            self.check_batch(batch)
            if self.lone_nodes:
                batch = with_lone_node(batch, self.base_keys[0], shared=reduce is not None)
            return evaluate(self, batch, reduce, with_metrics=metrics, kernels=self.kernels)

    def surrogate(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, **call: Any
    ) -> tuple[Tensor, ObjectiveOutput]:
        """Return this rank's share of J as a scalar whose gradient in `log_probs` [N] is the closed form.

        It serves a single pass: it is valid when one call sees every token of each of its nodes, or when `reduce`
        joins the ranks that do. `call` takes the keyword arguments of `__call__`.
        """
        old = old_log_probs.detach()
        out = self(log_probs.detach() - old, advantages, weights, old_log_probs=old, **call)
        attach: Callable[..., Tensor] = _ClosedForm.apply
        return attach(log_probs, out.value, out.gradient), out


@dataclass(frozen=True)
class TokenObjective(Objective):
    """Computes an objective in which a token's gated ratio depends on that token alone; the base class of such ones.

    A complete objective:

        @dataclass(frozen=True)
        class PowerWeight(TokenObjective):
            "Bounds no ratio, but bends it by a power: G = 1 + (r^power - 1) / power."

            power: float = 1.0
            "Exponent of the importance ratio."

            def gate(self, chunk: Chunk) -> GatedChunk:
                powered = chunk.ratio**self.power
                return GatedChunk(1 + (powered - 1) / self.power, chunk.weights * chunk.advantages * powered)
    """

    @abstractmethod
    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return the gated ratio G [n] and the gradient mu A dG/dx [n] of a chunk's tokens."""

    def clip(self, chunk: Chunk) -> Clip | None:
        """Return the bounds of each token's clip, for records of single tokens; None for an objective without one."""
        return None

    def prepare(self, nodes: NodeMap | None, sums: Tensor | None, parents: Tensor | None, like: Tensor) -> Gating:
        """Return a gating that calls `gate`."""
        return _TokenGating(self)


class _TokenGating(Gating):
    def __init__(self, objective: TokenObjective) -> None:
        self.objective = objective

    def gate(self, chunk: Chunk, values: list[Tensor]) -> GatedChunk:
        return self.objective.gate(chunk)

    def clip(self, chunk: Chunk, values: list[Tensor]) -> Clip | None:
        return self.objective.clip(chunk)


class _ClosedForm(torch.autograd.Function):
    """Identity on a precomputed value; its gradient in log_probs is the precomputed closed form."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = log_probs.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grads[0] * gradient).to(ctx.dtype), None, None
