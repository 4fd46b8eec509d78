"""The face of an objective: a callable with names, and an autograd function for single-pass use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.fibration.collective import Reduce
from fiberpo_megatron.fibration.evaluate import ObjectiveOutput, evaluate
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.fibration.rule import Rule
from fiberpo_megatron.fibration.tokens import make_batch, require_keys


class Objective:
    """J = sum_i mu_i G_i A_i with its closed-form gradient; built by `build_objective`."""

    def __init__(self, name: str, rule: Rule) -> None:
        self.name = name
        self._rule = rule

    def __repr__(self) -> str:
        return f"Objective({self.name!r}, levels={list(self.level_names)})"

    @property
    def level_names(self) -> tuple[str, ...]:
        """Levels fine to coarse; empty for objectives without gated levels."""
        return self._rule.level_names

    @property
    def uses_experts(self) -> bool:
        """True when the call needs `expert_share`."""
        return self._rule.uses_experts

    @property
    def spans_micro_batches(self) -> bool:
        """False when every level lies inside one trajectory, so that one pass per micro-batch is exact."""
        return self._rule.spans_micro_batches

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys a call must pass."""
        return (*self._rule.base_keys, *self._rule.parent_keys)

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
        metrics: bool = True,
        kernels: bool | None = None,
    ) -> ObjectiveOutput:
        """Gated ratio, gradient, value and metrics of this rank's tokens.

        Args:
            log_ratio: log pi_theta - log pi_old, [N], float32 or float64; clamped to +-20.
            advantages: A, [N].
            weights: mu >= 0, [N], summing to 1 over all ranks; a token of weight 0 is not in the sum.
            keys: per key the token's global dense id, int64 or int32 [N]. "trajectory" also serves metrics.
            expert_share: omega [N, P], rows sum to 1; ignored unless `uses_experts`. A rank without
                tokens passes [0, P].
            reduce: sums a flat float64 tensor over the ranks that share the mini-batch, in place or by
                returning it. Called exactly twice (never for an objective without levels and metrics).
            counts: global number of ids per key. Without it a single rank uses its largest id + 1; ranks
                that share tables use max(1024, the next power of two), which must agree between them.
            metrics: False skips the metrics; the same on all ranks.
            kernels: True runs the call in fused Triton kernels, False in torch. None takes the kernels where they
                can run: on CUDA with Triton 3.4 or newer.

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
            batch = make_batch(
                log_ratio,
                advantages,
                weights,
                keys=found,
                counts=counts,
                expert_share=expert_share if self.uses_experts else None,
            )
            return evaluate(self._rule, batch, reduce, with_metrics=metrics, kernels=kernels)

    def surrogate(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, **call: Any
    ) -> tuple[Tensor, ObjectiveOutput]:
        """This rank's share of J as a scalar whose gradient in `log_probs` [N] is the closed form.

        For single-pass use: valid where one call sees every token of each of its nodes, or where `reduce`
        joins the ranks that do. `call` takes the keyword arguments of `__call__`.
        """
        out = self(log_probs.detach() - old_log_probs.detach(), advantages, weights, **call)
        attach: Callable[..., Tensor] = _ClosedForm.apply
        return attach(log_probs, out.value, out.gradient), out


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
