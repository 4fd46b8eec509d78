"""This module takes the optimiser steps of one training step: old log-probs, then mini_batches x epochs exact steps.

Whatever the objective, the policy minimises -sum_j c_j log pi(a_j) with c_j = dJ / d log pi(a_j) in closed form
(docs/fibration.md): loss normalisation, micro-batching, packing and layout cannot change the gradient. The terms of a
run (`trainer/terms`) add to c_j, and bring -sum_j e_j H_j where they have an entropy in them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.fibration import Amplification
from fiberpo_megatron.interfaces import Layout, Objective, Passes
from fiberpo_megatron.spans import span
from fiberpo_megatron.telemetry.metrics import combine
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.batch import MiniBatch, packing_metrics
from fiberpo_megatron.trainer.drift import optimiser_drift
from fiberpo_megatron.trainer.importance import Weighing, weighed
from fiberpo_megatron.trainer.step_dump import GateCall, StepDump
from fiberpo_megatron.trainer.step_routing import StepRouting
from fiberpo_megatron.trainer.terms.base import GateTokens, StepStart
from fiberpo_megatron.trainer.terms.collection import Terms, summed
from fiberpo_megatron.trainer.token_records import StepTokens
from fiberpo_megatron.types import Coefficients, OptimizerStep, TokenScores


@dataclass(frozen=True)
class GateAnswer:
    """Holds what one call of the gate found."""

    output: Any
    """The objective's own output."""
    gradient: Tensor
    """[n] the objective's gradient and what the terms add to it."""
    entropy: Tensor | None
    """float64 [n] dJ / dH, or None."""
    weights: Tensor | None
    """float64 [n] what the masks left of the tokens' weights; None without terms."""
    metrics: Mapping[str, float]
    """Metrics of objective and terms; empty when none were asked for."""


@dataclass(frozen=True)
class Noted:
    """Says what an optimiser step notes of recorded tokens."""

    records: StepTokens
    index: int
    """Which of the mini-batches the step is about."""
    last: bool
    """Whether it is the last step on them."""


@dataclass
class ObjectiveGate:
    """This gate gives the coefficients of one mini-batch's tokens under the objective and its terms; it remembers what
    it was shown."""

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
    terms: Terms = field(default_factory=Terms)
    """What is added to the objective. With metrics, those of all terms travel in one further reduction, after the
    objective's two."""
    keeps_whole: bool = False
    """Whether `whole` is kept."""
    whole: GateAnswer | None = None
    """The answer about all of the rank's tokens, with metrics."""

    def __call__(self, log_probs: Tensor, part: slice) -> Coefficients:
        self.seen.append(log_probs.detach())
        with span("gate"):
            answer = self._evaluate(log_probs, part, self.reduce, metrics=self.reduce is not None)
        if self.kept is not None:
            self.kept.append(GateCall(part, log_probs.detach(), answer.output, answer.weights))
        if self.keeps_whole and self.reduce is not None:
            self.whole = answer
        return Coefficients(answer.gradient, answer.metrics, answer.entropy)

    def metrics(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the metrics of objective and terms over everything seen, when the calls were made one micro-batch at a
        time."""
        log_probs = torch.cat(self.seen)
        answer = self._evaluate(log_probs, slice(0, len(log_probs)), reduce, metrics=True)
        if self.keeps_whole:
            self.whole = answer
        return dict(answer.metrics)

    def _evaluate(
        self, log_probs: Tensor, part: slice, reduce: Callable[[Tensor], Tensor] | None, metrics: bool
    ) -> GateAnswer:
        batch, device = self.mini_batch, log_probs.device
        began = time.perf_counter()
        share = batch.expert_share
        timed = None if reduce is None else self._timed(reduce)

        def on_device(tensor: Tensor) -> Tensor:
            return tensor[part].to(device, non_blocking=True)  # the host need not wait for each copy

        def if_any(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else on_device(tensor)

        tokens = GateTokens(
            log_probs=log_probs.detach(),
            old_log_probs=on_device(self.old_log_probs),
            advantages=on_device(batch.advantages),
            weights=on_device(batch.weights),
            rollout_log_probs=on_device(batch.rollout_log_probs),
            reference_log_probs=if_any(batch.reference_log_probs),
            teacher_log_probs=if_any(batch.teacher_log_probs),
            keys={key: on_device(ids) for key, ids in batch.keys.items()},
            counts=batch.counts,
            values={name: on_device(values) for name, values in batch.term_values.items()},
            reduce=timed,
        )
        added = self.terms.coefficients(tokens)
        tokens, shares = self.terms.masked(tokens)
        out = self.objective(
            tokens.log_probs - tokens.old_log_probs,
            tokens.advantages,
            tokens.weights,
            keys=tokens.keys,
            counts=batch.counts,
            labels=batch.labels,
            expert_share=None if share is None else on_device(share),
            old_log_probs=tokens.old_log_probs,
            reduce=timed,
            metrics=metrics,
        )
        gradient = out.gradient
        if added.gradient is not None:
            gradient = (gradient.double() + added.gradient).to(gradient.dtype)
        found = dict(out.metrics.as_dict()) if metrics else {}
        if metrics and timed is not None:
            found |= summed(shares | added.sums, timed)
        self.seconds += time.perf_counter() - began
        if metrics:
            self.amplification = out.amplification
        return GateAnswer(out, gradient, added.entropy, tokens.weights if self.terms else None, found)

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
    weighing: Weighing | None = None,
    terms: Terms | None = None,
    records: StepTokens | None = None,
) -> dict[str, float]:
    """Take len(parts) x epochs optimiser steps; metrics are complete on last-stage ranks.

    `weighing` says how tokens are weighed by what sampled them; without it their weights stay what they are. `terms`
    are what is added to the objective; nothing by default.

    `dump` gets what the objective saw and gave in each of them, also where a step fails because something is not
    finite. `records` notes the same of a few tokens, and is written.
    """
    layout = policy.layout
    terms, passes = terms or Terms(), 0
    if terms.needs_reference and any(part.reference_log_probs is None for part in parts):
        with timers("reference"):  # before the pass that the first optimiser step goes on from: it moves the weights
            parts, passes = _with_reference(policy, parts, temperature), len(parts)
    with timers("old_log_probs"):
        routing.begin(parts)
        # The first optimiser step is that on the first part, and goes on from the pass before it.
        first, *others = parts
        further = [policy.log_probs(part.micro_batches, temperature, routing=routing.mode) for part in others]
        scores = [policy.log_probs(first.micro_batches, temperature, routing=routing.mode, keep=True), *further]
        parts = routing.attach(parts)
        parts, metrics = weighed(layout, parts, scores, weighing)
        metrics |= routing.agreement(parts)
    if terms:
        with together(layout, "preparing the terms"):
            if layout.is_last_stage:
                known = [found for found in scores if found is not None]
                prepared = terms.prepare(StepStart(parts, known, routing.rollouts, layout))
                parts, metrics = prepared.parts, {**metrics, **prepared.metrics}
    steps: list[tuple[OptimizerStep, ObjectiveGate, Mapping[str, float]]] = []
    if records is not None:
        records.start(parts, scores)
    with timers("train"), _finished(dump):
        for epoch in range(epochs):
            for index, (part, old) in enumerate(zip(parts, scores)):
                fresh = epoch == 0 and index == 0
                noted = None if records is None else Noted(records, index, epoch == epochs - 1)
                steps.append(_step(policy, objective, part, old, temperature, fresh, dump, terms, noted))
    if records is not None:
        records.finish(policy.routing if routing.mode != "off" else None)
        timers.add("token_records", records.seconds)
    timers.add("gate", sum(gate.seconds for _, gate, _ in steps))
    timers.add("gate_reduce", sum(gate.reduce_seconds for _, gate, _ in steps))
    metrics["gate/reduce_bytes"] = sum(gate.reduce_bytes for _, gate, _ in steps) / max(1, len(steps))
    metrics |= optimiser_drift(layout, [(gate.seen, gate.old_log_probs) for _, gate, _ in steps])
    metrics |= _summary([(outcome, recorded) for outcome, _, recorded in steps], parts)
    metrics["extra_forwards"] += passes
    return metrics | _amplification(layout, objective, [gate.amplification for _, gate, _ in steps])


def _with_reference(policy: Passes, parts: Sequence[MiniBatch], temperature: float) -> list[MiniBatch]:
    """Return the parts with their tokens' log-probs under the reference, which routes tokens by its own routers."""
    with policy.reference():
        scores = [policy.log_probs(part.micro_batches, temperature) for part in parts]
    known = [None if found is None else found.log_probs for found in scores]
    return [replace(part, reference_log_probs=found) for part, found in zip(parts, known)]


def _step(
    policy: Passes,
    objective: Objective,
    part: MiniBatch,
    old: TokenScores | None,
    temperature: float,
    fresh: bool,
    dump: StepDump | None,
    terms: Terms,
    noted: Noted | None,
) -> tuple[OptimizerStep, ObjectiveGate, Mapping[str, float]]:
    """One optimiser step. `fresh`: the weights have not moved since the old log-probs, so x = 0 by definition and
    no extra forward is needed; nor is it where every level lies inside one micro-batch. A trajectory does not where its
    branches were packed into several; every rank knows that, because it has assigned the rows of all ranks."""
    layout = policy.layout
    old_log_probs = old.log_probs if old is not None else torch.zeros(0)
    spans = objective.spans_micro_batches or terms.spans_micro_batches or part.packing.split > 0
    single_pass = not fresh and not spans and layout.context_size == 1
    gate = ObjectiveGate(objective, part, old_log_probs, None if single_pass else layout.sum_over_tokens, terms=terms)
    gate.keeps_whole = noted is not None and noted.last
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
    if noted is not None and layout.is_last_stage:
        whole, gate.whole = gate.whole, None  # it holds tensors of all tokens
        weights, trace = (None, None) if whole is None else (whole.weights, whole.output.trace)
        noted.records.add(noted.index, part, old_log_probs, gate.seen, outcome.coefficients, weights, trace)
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
        # the first optimiser step follows the pass for the old log-probs, later ones that of the gates
        "kept_forward_share": steps[0][0].kept_forwards / max(1, sum(len(part.micro_batches) for part in parts)),
        **packing_metrics([part.packing for part in parts]),
    }
