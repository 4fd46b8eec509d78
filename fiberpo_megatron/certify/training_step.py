"""This module compares the whole training step in several layouts: log-probs, coefficients, gradient and parameters.

The reference is one process in float64 with all trajectories in one micro-batch; a layout runs in float32 or bfloat16
through the policy that training uses, with the mini-batches, the gate and the passes of a run. Both start from weights
that the layout's type holds exactly. Log ratios come from the seed: the old log-probs are the reference's own minus
them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.certify.batch import VERSION, Problem
from fiberpo_megatron.certify.checks import Check
from fiberpo_megatron.certify.compare import Difference, difference
from fiberpo_megatron.fibration import Objective, build_objective
from fiberpo_megatron.fibration.levels import STATE_KEY
from fiberpo_megatron.types import Coefficients, TokenScores, concatenated_response_tokens

TIMEOUT_S = 100.0
TEMPERATURE = 0.8
LEARNING_RATE, ADAM_EPS, CLIP_GRAD = 1e-2, 1e-3, 0.3
"""Settings of the optimiser steps. Adam divides by the gradient's size: an eps far below it would turn rounding noise
of elements whose gradient is nearly zero into whole steps, in either run."""
SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data")

Piece = tuple[str, tuple[int, ...], tuple[int, ...], NDArray[np.float64]]
"""(key, global shape, offset, values) of one rank's part of a global tensor."""


@dataclass(frozen=True)
class Case:
    """Holds what is run: a model, an objective, trajectories and a layout."""

    model: Mapping[str, Any]
    """Contents of config.json; weights are drawn from `seed`."""
    objective: tuple[str, dict[str, Any]]
    """Short name or import path, and options."""
    problem: Problem
    sizes: Mapping[str, int]
    """Sizes of the layout by name (SIZES); those left out are 1."""
    micro_batch_tokens: int
    """Token budget of a micro-batch; a longer trajectory gets one of its own."""
    seed: int = 0
    steps: int = 0
    """Optimiser steps after which parameters are compared."""
    terms: Mapping[str, Any] = field(default_factory=dict)
    """Sections of [algorithm] that add terms to the objective. What they read is drawn from `seed`: the log-probs of
    reference, teacher and engine lie around the policy's own, and a third of the trajectories is right."""
    dtype: str = "float32"
    """Type in which the layout computes: float32 or bfloat16."""

    @property
    def ranks(self) -> int:
        """Return the number of processes of the layout."""
        return int(np.prod([self.sizes.get(name, 1) for name in ("tensor", "pipeline", "context", "data")]))

    def config(self, sizes: Mapping[str, int]) -> Any:
        """Return a run's config for a layout; routers train, so that their gradient is compared too."""
        from fiberpo_megatron.config.schema import Config

        return Config.model_validate(
            {
                "run": {"seed": self.seed, "distributed_timeout_s": TIMEOUT_S},
                "model": {"path": ".", "random_init": True, "dtype": self.dtype, "train_router": True},
                "parallel": {**sizes, "distributed_optimizer": False},
                "optimizer": {"learning_rate": LEARNING_RATE, "eps": ADAM_EPS, "clip_grad": CLIP_GRAD},
                "algorithm": dict(self.terms),
            }
        )

    def check(self) -> None:
        """Raise ValueError, with the setting and the values that fit, when the layout does not divide the model."""
        from fiberpo_megatron.mcore.parallel.checks import check_layout

        check_layout(self.model, self.config(self.sizes).parallel, self.ranks)

    def build_objective(self) -> Objective:
        """Return the objective."""
        return build_objective(self.objective[0], **self.objective[1])

    def build_terms(self) -> Any:
        """Return the terms."""
        from fiberpo_megatron.trainer.terms import build_terms

        return build_terms(self.config({}).algorithm)

    def drift(self, name: str) -> NDArray[np.float64]:
        """Return [N] differences from the policy's log-probs, of "reference", "teacher" or "engine"."""
        random = np.random.default_rng([self.seed, *name.encode()])
        rollouts = self.problem.rollouts
        of_trajectory = np.repeat(random.normal(scale=0.1, size=len(rollouts.lengths)), rollouts.lengths)
        return of_trajectory + random.normal(scale=0.4, size=len(rollouts.tokens))


@dataclass
class Outcome:
    """Holds what one rank computed; [n] are its response tokens."""

    index: NDArray[np.int64]
    """[n] places in the flat arrays; empty except on the last pipeline stage."""
    log_probs: NDArray[np.float64]
    old_log_probs: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    gradient: list[Piece]
    parameters: list[Piece]
    """Parameters after the steps; empty without steps."""


class Collected:
    """Collects what a gate saw and gave in the first pass over all micro-batches."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._seen = 0

    def add(self, log_probs: Tensor, coefficients: Tensor) -> None:
        """Take one call's values, unless all tokens have been seen."""
        if self._seen < self._size:
            self._calls.append((log_probs.detach().cpu(), coefficients.detach().cpu()))
            self._seen += len(log_probs)

    def joined(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return log-probs and coefficients [n]; empty on a rank whose gate was not called."""
        if not self._calls:
            return np.zeros(0), np.zeros(0)
        log_probs, coefficients = (torch.cat(values).double().numpy() for values in zip(*self._calls))
        return log_probs, coefficients


def _mini_batch(case: Case, layout: Any, budget: int) -> Any:
    """This rank's share, as a run packs it."""
    from fiberpo_megatron.trainer.batch import mini_batches
    from fiberpo_megatron.trainer.settings import BatchConfig

    problem, objective = case.problem, case.build_objective()
    (part,) = mini_batches(
        problem.rollouts,
        problem.advantages,
        batch=BatchConfig(micro_batch_tokens=budget, oversized="own_micro_batch"),
        weighting=objective.weighting,
        normaliser=problem.normaliser,
        domains=problem.domains,
        layout=layout,
        version=VERSION,
        states=STATE_KEY in objective.keys,
    )
    index = concatenated_response_tokens(part.micro_batches)
    share = torch.from_numpy(problem.expert_share)[index] if objective.uses_experts else None
    return replace(part, expert_share=share)


def _prepared(case: Case, terms: Any, part: Any, old: Tensor, layout: Any) -> Any:
    """Return the mini-batch as the terms prepare it, beside log-probs of other models around the policy's."""
    from fiberpo_megatron.trainer.terms import StepStart

    if not terms:
        return part
    index = concatenated_response_tokens(part.micro_batches)
    policy = old.double() + torch.from_numpy(case.problem.log_ratio)[index]
    others = {
        f"{field}_log_probs": (policy - torch.from_numpy(case.drift(name))[index]).to(old.dtype)
        for field, name in (("reference", "reference"), ("teacher", "teacher"), ("rollout", "engine"))
    }
    rollouts = case.problem.rollouts
    right = np.random.default_rng([case.seed, 3]).random(len(rollouts.lengths))[rollouts.trajectories] < 1 / 3
    start = StepStart(
        parts=[replace(part, **others)],
        scores=[TokenScores(old, torch.zeros_like(old))],
        rollouts=replace(rollouts, correct=right),
        layout=layout,
    )
    (prepared,) = terms.prepare(start).parts
    return prepared


def run_reference(case: Case) -> Outcome:
    """Run one process with one micro-batch in float64."""
    from fiberpo_megatron.mcore.families import read_architecture
    from fiberpo_megatron.mcore.model import build_model, draw_weights
    from fiberpo_megatron.mcore.optimizers import make_optimizer
    from fiberpo_megatron.mcore.optimizers.adam import Adam
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.schedule import Schedule
    from fiberpo_megatron.mcore.transformer_config import DTYPES
    from fiberpo_megatron.mcore.weights.global_tensors import global_shards, gradient_shards
    from fiberpo_megatron.trainer.optimise import ObjectiveGate

    config = case.config({})
    layout = start_layout(case.model, config.parallel, config.run)
    architecture = read_architecture(case.model)
    models = build_model(architecture, config.model, layout, dtype=torch.float64)
    draw_weights(models, architecture, case.seed)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.copy_(parameter.to(DTYPES[case.dtype]))
    part = _mini_batch(case, layout, int(case.problem.rollouts.lengths.sum()))
    (batch,) = part.micro_batches
    index = batch.response_tokens.numpy()
    drift = torch.from_numpy(case.problem.log_ratio[index])
    collected = Collected(len(index))
    old: list[Tensor] = []
    terms = case.build_terms()
    prepared: list[Any] = []

    def loss(_: int, log_probs: Tensor, entropy: Tensor) -> Tensor:
        values = log_probs.detach()
        if not old:
            old.append(values - drift)
            prepared.append(_prepared(case, terms, part, old[0], layout))
        gate = ObjectiveGate(case.build_objective(), prepared[0], old[0], None, terms=terms)
        found = gate(values, slice(0, len(values)))
        collected.add(values, found.gradient)
        loss = -(found.gradient * log_probs).sum()
        return loss if found.entropy is None else loss - (found.entropy * entropy).sum()

    parameters = [parameter for parameter in models[0].parameters() if parameter.requires_grad]
    adam, settings = make_optimizer(config.optimizer), config.optimizer
    assert isinstance(adam, Adam), "the reference is Adam"
    optimizer = torch.optim.AdamW(
        parameters,
        settings.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=settings.weight_decay,
    )
    schedule = Schedule(models, models, layout, 4096)
    gradient: list[Piece] = []
    for _ in range(max(1, case.steps)):
        optimizer.zero_grad()
        schedule.forward_backward([batch], TEMPERATURE, loss)
        if not gradient:
            for parameter in parameters:
                parameter.main_grad = parameter.grad
            gradient = pieces(gradient_shards(models))
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
    log_probs, coefficients = collected.joined()
    return Outcome(
        index=index,
        log_probs=log_probs,
        old_log_probs=old[0].numpy(),
        coefficients=coefficients,
        gradient=gradient,
        parameters=pieces(global_shards(models)) if case.steps else [],
    )


def run_rank(case: Case, old_log_probs: Mapping[int, float], budgets: Sequence[int]) -> list[Outcome]:
    """Run one rank of the layout: the gradient for each budget of a micro-batch, then the steps with the last of them.

    `old_log_probs` are those of the response tokens, by their places in the flat arrays.
    """
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.mcore.weights.global_tensors import global_shards, gradient_shards
    from fiberpo_megatron.trainer.optimise import ObjectiveGate

    config = case.config(case.sizes)
    layout = start_layout(case.model, config.parallel, config.run)
    policy = build_policy(config, case.model, layout)
    objective, terms = case.build_objective(), case.build_terms()
    spans = objective.spans_micro_batches or terms.spans_micro_batches
    outcomes = []
    for budget in budgets:
        part = _mini_batch(case, layout, budget)
        single = not spans and layout.context_size == 1 and not part.packing.split
        index = concatenated_response_tokens(part.micro_batches)
        old = torch.tensor([old_log_probs[place] for place in index.tolist()], dtype=torch.float32)
        if layout.is_last_stage:
            part = _prepared(case, terms, part, old, layout)
        gate = ObjectiveGate(objective, part, old, None if single else layout.sum_over_tokens, terms=terms)
        collected = Collected(len(index))

        def coefficients(log_probs: Tensor, where: slice, gate: Any = gate, to: Collected = collected) -> Coefficients:
            found = gate(log_probs, where)
            to.add(log_probs, found.gradient)
            return Coefficients(found.gradient, entropy=found.entropy)

        policy.accumulate(part.micro_batches, coefficients, TEMPERATURE, single_pass=single)
        gradient = pieces(gradient_shards(policy.models))
        if budget == budgets[-1]:
            for _ in range(case.steps):
                policy.step(part.micro_batches, coefficients, TEMPERATURE, single_pass=single)
        log_probs, values = collected.joined()
        outcomes.append(
            Outcome(
                index=index.numpy() if layout.is_last_stage else index.numpy()[:0],
                log_probs=log_probs,
                old_log_probs=old.double().numpy() if layout.is_last_stage else np.zeros(0),
                coefficients=values,
                gradient=gradient,
                parameters=pieces(global_shards(policy.models)) if case.steps and budget == budgets[-1] else [],
            )
        )
    return outcomes


def pieces(shards: Any) -> list[Piece]:
    """Return sharded tensors as plain data."""
    return [
        (s.key, tuple(s.global_shape), tuple(s.global_offset), s.data.detach().double().cpu().numpy().copy())
        for s in shards
    ]


def assemble(parts: Iterable[list[Piece]]) -> dict[str, NDArray[np.float64]]:
    """Return global tensors made of every rank's pieces."""
    whole: dict[str, NDArray[np.float64]] = {}
    for rank in parts:
        for key, shape, offset, values in rank:
            target = whole.setdefault(key, np.full(shape, np.nan))
            values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
            target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape))] = values
    return whole


def compare(reference: Outcome, outcomes: Sequence[Outcome]) -> tuple[dict[str, Difference], str]:
    """Return the largest differences from the reference by quantity, and the name of the worst parameter.

    Raises ValueError when ranks do not hold every token and every parameter, because a difference would then say
    nothing.
    """
    found = {name: _tokens(name, reference, outcomes) for name in ("log_probs", "coefficients")}
    found["gradient"], worst = tensor_difference(reference.gradient, [outcome.gradient for outcome in outcomes])
    if reference.parameters:
        found["parameters"], worst = tensor_difference(
            reference.parameters, [outcome.parameters for outcome in outcomes]
        )
    return found, worst


def _tokens(name: str, reference: Outcome, outcomes: Sequence[Outcome]) -> Difference:
    index = np.concatenate([outcome.index for outcome in outcomes])
    values = np.concatenate([getattr(outcome, name) for outcome in outcomes])
    places, first = np.unique(index, return_index=True)  # tensor-parallel ranks hold the same tokens
    order = np.argsort(reference.index)
    if not np.array_equal(places, reference.index[order]):
        raise ValueError("some response tokens are on no rank, or are none; the layout lost or invented tokens")
    return difference(torch.from_numpy(values[first]), torch.from_numpy(getattr(reference, name)[order]))


def tensor_difference(wanted: list[Piece], ranks: Sequence[list[Piece]]) -> tuple[Difference, str]:
    """Return the largest difference of global tensors, each relative to its own largest element, and that tensor's
    name."""
    worst, name, differing = Difference(0, 0.0, 0.0, None), "", 0
    found = assemble(ranks)
    for key, value in assemble([wanted]).items():
        if key not in found:
            raise ValueError(f"no rank holds {key}")
        rows = found[key][tuple(slice(0, n) for n in value.shape)]  # without the rows that pad the vocabulary
        if not np.isfinite(rows).all():
            raise ValueError(f"no rank holds all of {key}, or it is not finite")
        one = difference(torch.from_numpy(rows.reshape(-1)), torch.from_numpy(value.reshape(-1)))
        differing += one.differing
        if one.relative >= worst.relative:
            worst, name = one, key
    return Difference(differing, worst.largest, worst.relative, worst.at), name


def check_own_gates(
    case: Case, outcomes: Sequence[Outcome], part: str, what: str, subject: str, device: str = "cpu"
) -> Check:
    """Return a check of what the ranks' gates gave against one call, in this process, about what they saw.

    `device` is the type of those on which the ranks ran: equal bits are claimed for one type.
    """
    index = np.concatenate([outcome.index for outcome in outcomes])
    places, first = np.unique(index, return_index=True)
    now, old, given = (
        torch.from_numpy(np.concatenate([getattr(outcome, name) for outcome in outcomes])[first]).float()
        for name in ("log_probs", "old_log_probs", "coefficients")
    )
    objective = case.build_objective()
    tokens = replace(case.problem.tokens(objective.weighting), log_ratio=now - old, old_log_probs=old)
    wanted = tokens.to(device=device).call(objective, metrics=False).gradient
    found = {"coefficients": difference(given, wanted)}
    at = found["coefficients"].at
    where = None if at is None else f"coefficient of the token at place {int(places[at])}"
    return Check(part, what, subject, found, None, where)
