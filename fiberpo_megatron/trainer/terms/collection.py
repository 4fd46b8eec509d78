"""This module asks all terms of a run at once, in the order in which the config lists them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.telemetry.metrics import combine
from fiberpo_megatron.trainer.terms.base import GateTokens, Prepared, StepStart, Term


@dataclass(frozen=True)
class Added:
    """Holds what all terms add in one call of the gate."""

    gradient: Tensor | None
    """float64 [n]; None if no term adds any."""
    entropy: Tensor | None
    """float64 [n]; None if no term adds any."""
    sums: dict[str, Tensor]
    """This rank's shares of the metrics."""


class Terms:
    """Holds the terms of a run. Without any it changes nothing, in no bit."""

    def __init__(self, terms: Sequence[Term] = ()) -> None:
        self.all = tuple(terms)

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def needs_reference(self) -> bool:
        """Return whether any term reads the reference's log-probs."""
        return any(term.needs_reference for term in self.all)

    @property
    def spans_micro_batches(self) -> bool:
        """Return whether any term makes a single pass wrong."""
        return any(term.spans_micro_batches for term in self.all)

    def prepare(self, step: StepStart) -> Prepared:
        """Let each term replace what it wants in the mini-batches, one after the other."""
        records = []
        for term in self.all:
            prepared = term.prepare(step)
            step = replace(step, parts=prepared.parts)
            records.append(prepared.metrics)
        return Prepared(list(step.parts), combine(records))

    def masked(self, tokens: GateTokens) -> tuple[GateTokens, dict[str, Tensor]]:
        """Return the tokens with the weights that the masks leave, and this rank's shares of the masks' metrics."""
        sums: dict[str, Tensor] = {}
        for term in self.all:
            mask = term.mask(tokens)
            if mask is not None:
                tokens = replace(tokens, weights=tokens.weights * mask.factor)
                sums |= mask.sums
        return tokens, sums

    def coefficients(self, tokens: GateTokens) -> Added:
        """Return the sum of what all terms add at these tokens."""
        gradient = entropy = None
        sums: dict[str, Tensor] = {}
        for term in self.all:
            found = term.coefficients(tokens)
            gradient = _plus(gradient, found.gradient)
            entropy = _plus(entropy, found.entropy)
            sums |= found.sums
        return Added(gradient, entropy, sums)

    def update(self, layout: Layout, metrics: Mapping[str, float], trajectories: int) -> None:
        """Let the terms move what they keep, by a training step's metrics. Every rank calls it.

        The metrics are complete on the last pipeline stage; what its logging rank makes of them holds on every rank.
        """
        if not self.state():
            return
        if layout.is_last_stage:
            for term in self.all:
                term.update(metrics, trajectories)
        states = layout.gather_json(self.state() if layout.is_logger else None)
        self.restore(next(state for state in states if state is not None))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, by each term's name."""
        found = {term.name: term.state() for term in self.all}
        return {name: state for name, state in found.items() if state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned. A term that a checkpoint does not know keeps the config's values."""
        for term in self.all:
            if term.name in state:
                term.restore(state[term.name])


def summed(sums: Mapping[str, Tensor], reduce: Any) -> dict[str, float]:
    """Return metrics from this rank's shares of them, in one reduction; none without any."""
    if not sums:
        return {}
    total = reduce(torch.stack([value.double() for value in sums.values()]))
    return dict(zip(sums, total.tolist()))


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if more is None:
        return total
    return more.double() if total is None else total + more.double()
