"""This module takes the optimiser steps of one training step: old log-probs, then mini_batches x epochs exact steps.

Whatever the objective, the policy minimises -sum_j c_j log pi(a_j) with c_j = dJ / d log pi(a_j) in closed form
(docs/fibration.md): loss normalisation, micro-batching, packing and layout cannot change the gradient.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.fibration import Amplification
from fiberpo_megatron.interfaces import Layout, Objective, Passes
from fiberpo_megatron.telemetry.metrics import combine
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.batch import MiniBatch, packing_metrics
from fiberpo_megatron.trainer.step_dump import GateCall, StepDump
from fiberpo_megatron.trainer.step_routing import StepRouting
from fiberpo_megatron.types import Coefficients, OptimizerStep, TokenScores


@dataclass
class ObjectiveGate:
    """This gate gives the coefficients of one mini-batch's tokens under the objective; it remembers what it was
    shown."""

    objective: Objective
    mini_batch: MiniBatch
    old_log_probs: Tensor
    """float32 [n]"""
    reduce: Callable[[Tensor], Tensor] | None
    """Sum over the ranks that hold the other tokens; None while a call sees whole trajectories only."""
    seen: list[Tensor] = field(default_factory=list)
    """Log-probs of the calls so far, in order."""
    seconds: float = 0.0
    """Time spent in the objective, its reductions included."""
    reduce_seconds: float = 0.0
    """The part of it inside reductions: moving the node sums, and waiting for the slowest rank."""
    reduce_bytes: int = 0
    """Size of what the reductions summed."""
    amplification: Amplification | None = None
    """This rank's largest |c| / (mu |A|), once a call was asked for metrics."""
    kept: list[GateCall] | None = None
    """Every call with what it gave, in order, for a step dump; None when no dump is asked for."""

    def __call__(self, log_probs: Tensor, part: slice) -> Coefficients:
        self.seen.append(log_probs.detach())
        out = self._evaluate(log_probs, part, self.reduce, metrics=self.reduce is not None)
        if self.kept is not None:
            self.kept.append(GateCall(part, log_probs.detach(), out))
        return Coefficients(out.gradient, out.metrics.as_dict() if self.reduce is not None else {})

    def metrics(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the objective's metrics over everything seen, when the calls were made one micro-batch at a time."""
        log_probs = torch.cat(self.seen)
        return dict(self._evaluate(log_probs, slice(0, len(log_probs)), reduce, metrics=True).metrics.as_dict())

    def _evaluate(
        self, log_probs: Tensor, part: slice, reduce: Callable[[Tensor], Tensor] | None, metrics: bool
    ) -> Any:
        batch, device = self.mini_batch, log_probs.device
        began = time.perf_counter()
        share = batch.expert_share

        def on_device(tensor: Tensor) -> Tensor:
            return tensor[part].to(device, non_blocking=True)  # the host need not wait for each copy

        out = self.objective(
            log_probs.detach() - on_device(self.old_log_probs),
            on_device(batch.advantages),
            on_device(batch.weights),
            keys={key: on_device(ids) for key, ids in batch.keys.items()},
            counts=batch.counts,
            labels=batch.labels,
            expert_share=None if share is None else on_device(share),
            reduce=None if reduce is None else self._timed(reduce),
            metrics=metrics,
        )
        self.seconds += time.perf_counter() - began
        if metrics:
            self.amplification = out.amplification
        return out

    def _timed(self, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(sums: Tensor) -> Tensor:
            began = time.perf_counter()
            out = reduce(sums)
            self.reduce_seconds += time.perf_counter() - began
            self.reduce_bytes += sums.nbytes
            return out

        return timed


def optimise(
    policy: Passes,
    objective: Objective,
    parts: Sequence[MiniBatch],
    routing: StepRouting,
    *,
    epochs: int,
    temperature: float,
    timers: PhaseTimers,
    dump: StepDump | None = None,
) -> dict[str, float]:
    """Take len(parts) x epochs optimiser steps; metrics are complete on last-stage ranks.

    `dump` gets what the objective saw and gave in each of them, also where a step fails because something is not
    finite.
    """
    layout = policy.layout
    with timers("old_log_probs"):
        routing.begin()
        scores = [policy.log_probs(part.micro_batches, temperature, routing=routing.mode) for part in parts]
        parts = routing.attach(parts)
        metrics = _rollout_metrics(layout, parts, scores) | routing.agreement(parts)
    steps: list[tuple[OptimizerStep, ObjectiveGate, Mapping[str, float]]] = []
    with timers("train"), _finished(dump):
        for epoch in range(epochs):
            for index, (part, old) in enumerate(zip(parts, scores)):
                fresh = epoch == 0 and index == 0
                steps.append(_step(policy, objective, part, old, temperature, fresh, dump))
    timers.add("gate", sum(gate.seconds for _, gate, _ in steps))
    timers.add("gate_reduce", sum(gate.reduce_seconds for _, gate, _ in steps))
    metrics["gate/reduce_bytes"] = sum(gate.reduce_bytes for _, gate, _ in steps) / max(1, len(steps))
    metrics |= _summary([(outcome, recorded) for outcome, _, recorded in steps], parts)
    return metrics | _amplification(layout, objective, [gate.amplification for _, gate, _ in steps])


def _step(
    policy: Passes,
    objective: Objective,
    part: MiniBatch,
    old: TokenScores | None,
    temperature: float,
    fresh: bool,
    dump: StepDump | None,
) -> tuple[OptimizerStep, ObjectiveGate, Mapping[str, float]]:
    """One optimiser step. `fresh`: the weights have not moved since the old log-probs, so x = 0 by definition and
    no extra forward is needed; nor is it where every level lies inside one micro-batch."""
    layout = policy.layout
    old_log_probs = old.log_probs if old is not None else torch.zeros(0)
    single_pass = not fresh and not objective.spans_micro_batches and layout.context_size == 1
    gate = ObjectiveGate(objective, part, old_log_probs, None if single_pass else layout.sum_over_tokens)
    if dump is not None:
        gate.kept = []
    metrics: Mapping[str, float] = {}
    try:
        outcome = policy.step(
            part.micro_batches,
            gate,
            temperature,
            log_probs=old_log_probs if fresh else None,
            single_pass=single_pass,
        )
        if layout.is_last_stage:
            metrics = gate.metrics(layout.sum_over_tokens) if single_pass else outcome.coefficients[0].metrics
    finally:
        if dump is not None and gate.kept is not None:
            dump.add(part, old_log_probs, gate.kept, single_pass, metrics)
    return outcome, gate, metrics


@contextmanager
def _finished(dump: StepDump | None) -> Iterator[None]:
    """Finish the dump after the steps, also after one that all ranks refused because something is not finite."""
    try:
        yield
    except FloatingPointError:
        if dump is not None:
            dump.finish()
        raise
    if dump is not None:
        dump.finish()


def _rollout_metrics(
    layout: Layout, parts: Sequence[MiniBatch], scores: Sequence[TokenScores | None]
) -> dict[str, float]:
    """Entropy, and how far the engine's log-probs are from the trainer's for the same weights and tokens."""
    known = [(part, s) for part, s in zip(parts, scores) if s is not None]
    if not known:
        return {}
    device = known[0][1].log_probs.device
    differences = torch.cat([(s.log_probs - p.rollout_log_probs.to(device)).abs() for p, s in known]).double()
    entropy = torch.cat([s.entropy for _, s in known]).double()
    total, tokens, nats = layout.sum_over_tokens(
        torch.stack([differences.sum(), torch.tensor(float(len(differences)), device=device), entropy.sum()]).double()
    ).tolist()
    largest = torch.cat([differences, differences.new_zeros(1)]).max().reshape(1)
    return {
        "rollout_diff/mean": total / tokens,
        "rollout_diff/max": layout.max_over_tokens(largest).item(),
        "entropy": nats / tokens,
    }


def _amplification(layout: Layout, objective: Objective, steps: Sequence[Amplification | None]) -> dict[str, float]:
    """The largest |c| / (mu |A|) of all optimiser steps and ranks, and where it came from."""
    levels = objective.level_names
    if not levels or not layout.is_last_stage:
        return {}
    keys = tuple(dict.fromkeys((*objective.keys, "expert")))
    found = [(-it.value, step, *it.order, it) for step, it in enumerate(steps) if it is not None]
    rows = torch.full((layout.data_size * layout.context_size, 5 + len(keys)), -1.0, dtype=torch.float64)
    if found:
        size, step, base, place, it = min(found, key=lambda row: row[:-1])
        level = -1.0 if it.level == "token" else levels.index(it.level)
        ids = [it.node.get(key, -1) for key in keys]
        mine = [-size, step, base, place, level, *ids]
        rows[layout.data_rank * layout.context_size + layout.context_rank] = torch.tensor(mine, dtype=torch.float64)
    size, _, _, _, level, *ids = min(layout.max_over_tokens(rows).tolist(), key=lambda row: (-row[0], *row[1:4]))
    if size < 0.0:
        return {}
    nodes = {f"amplification/node/{key}": number for key, number in zip(keys, ids) if number >= 0}
    return {"amplification/max": size, "amplification/level": level, **nodes}


def _summary(
    steps: Sequence[tuple[OptimizerStep, Mapping[str, float]]], parts: Sequence[MiniBatch]
) -> dict[str, float]:
    """One record of all optimiser steps, by each metric's own rule (means, but the largest of maxima)."""
    norms = [outcome.gradient_norm for outcome, _ in steps]
    outcomes = [
        {"gradient_norm": outcome.gradient_norm, "learning_rate": outcome.learning_rate, **metrics}
        for outcome, metrics in steps
    ]
    return {
        **combine(outcomes),
        "gradient_norm_max": max(norms),
        "extra_forwards": float(sum(outcome.extra_forward for outcome, _ in steps)),
        **packing_metrics([part.packing for part in parts]),
    }
