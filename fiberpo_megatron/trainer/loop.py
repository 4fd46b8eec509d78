"""The main loop: generate -> score -> advantages -> pack -> old log-probs -> k optimiser steps -> publish -> log.

Every rank runs it; every collaborator is passed in, so the same function trains a toy policy with a fake engine in
the tests and a Megatron model with SGLang on a cluster.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fiberpo_megatron.config import Config
from fiberpo_megatron.telemetry.metrics import Kind
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.advantages import group_advantages
from fiberpo_megatron.trainer.batch import flatten, mini_batches
from fiberpo_megatron.trainer.generation import Generator, share
from fiberpo_megatron.trainer.memory import OwnDevices, Turns
from fiberpo_megatron.trainer.optimise import Objective, optimise
from fiberpo_megatron.trainer.publication_check import verify_publication
from fiberpo_megatron.trainer.step_routing import StepRouting
from fiberpo_megatron.trainer.stop import Stopped, never
from fiberpo_megatron.trainer.together import together
from fiberpo_megatron.types import Policy, Prompt, RolloutBatch, RolloutGroup


class Prompts(Protocol):
    """The data: a pure function of the step, so that resuming needs nothing but the step number."""

    @property
    def domains(self) -> Sequence[str]:
        """Names, in the order of `Prompt.domain`."""
        ...

    def prompts_at(self, seed: int, step: int, count: int) -> list[Prompt]: ...

    def held_out(self, count: int) -> list[Prompt]: ...

    def observe(self, rollouts: RolloutBatch) -> Mapping[str, float]:
        """See a step's rollouts, which may move a curriculum; metrics."""
        ...

    def state(self) -> Mapping[str, object]:
        """What a resumed run needs beside the step; JSON values."""
        ...


class Publisher(Protocol):
    """Carries weights to the engines; every rank calls it, only rank 0 talks to them."""

    def publish(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None: ...


class Recorder(Protocol):
    """Where metrics and samples go. Called on every rank; writes on the ranks that should."""

    def record(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """`step`: of "train" and "sft" records the step's index from 0, of "eval" records the steps done."""
        ...

    def rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None: ...


class Checkpoints(Protocol):
    def save(self, policy: Policy, step: int, *, prompts: Mapping[str, object], measured: Mapping[str, float]) -> None:
        """Begin to save the state after `step` steps. `measured`: the step's metrics as "train/..." and "eval/..."."""
        ...

    def complete(self, wait: bool) -> int:
        """Finish what an asynchronous save has written, or, if asked, wait for it; the last step of this run that a
        checkpoint holds, 0 if none does. Every rank calls it."""
        ...


class Store(Protocol):
    """Rollouts on disk; every rank calls it, but for `unfinished`."""

    def load(self, step: int, prompts: Sequence[Prompt], weights: str) -> RolloutBatch | None:
        """The step's trajectories, equal on every rank, where they need not be generated. Raises when they are to be
        replayed and cannot be."""
        ...

    def save(self, step: int, prompts: Sequence[Prompt], weights: str, batch: RolloutBatch) -> None:
        """Keep trajectories that were just generated."""
        ...

    def unfinished(
        self, step: int, prompts: Sequence[Prompt], weights: str, mine: Sequence[int]
    ) -> AbstractContextManager[MutableMapping[int, RolloutGroup]]:
        """The finished groups of a step whose generation was cut short, by index of their prompt, as far as they are
        among `mine`; what is put there is kept for a resume. For leaders."""
        ...

    def saved(self, done: int) -> None:
        """A checkpoint holds the first `done` steps."""
        ...


@dataclass(frozen=True)
class Training:
    """Everything the loop works with."""

    config: Config
    policy: Policy
    prompts: Prompts
    generator: Generator | None
    """None where rollouts are replayed: there is no engine, nothing is published or evaluated."""
    objective: Objective
    publisher: Publisher | None
    """None where `generator` is."""
    recorder: Recorder
    checkpoints: Checkpoints
    timers: PhaseTimers
    rollouts: Store
    stop: Callable[[], bool] = never
    """Whether this rank was asked to stop."""
    turns: Turns = OwnDevices()
    """Lets training have the devices' memory where it shares them with engines."""


def train(run: Training, start: int = 0) -> None:
    """Train from step `start` (0, or the step of the checkpoint that was loaded) to `trainer.steps`.

    Raises Stopped, on all ranks at the same step and after saving, when any rank was asked to stop: after a step, or
    before its first optimiser step, in the middle of its generation too.
    """
    config, saved = run.config, start
    publish(run, start, probe=None)
    if start == 0:
        evaluate(run, 0)
    for step in range(start, config.trainer.steps):
        done = step + 1
        rollouts = generate(run, step, step)
        if rollouts is None or _asked_to_stop(run):
            if step > saved:
                _save(run, step, {})
            _complete_save(run, wait=True)
            raise Stopped(step)
        with run.turns.training(publishes=True):
            metrics = learn(run, rollouts)
        publish(run, done, probe=rollouts)
        metrics |= run.prompts.observe(rollouts)
        run.recorder.record("train", step, metrics | _throughput(rollouts, run.timers.read()))
        measured = {f"train/{name}": value for name, value in metrics.items()}
        if _due(done, config.evaluation.every_steps, config.trainer.steps):
            measured |= {f"eval/{name}": value for name, value in evaluate(run, done).items()}
        stopping = _asked_to_stop(run)
        if stopping or _due(done, config.checkpoint.every_steps, config.trainer.steps):
            _save(run, done, measured)  # last: a step whose checkpoint exists has been recorded
            saved = done
        _complete_save(run, wait=stopping or done == config.trainer.steps)
        if stopping and done < config.trainer.steps:
            raise Stopped(done)


def generate(run: Training, step: int, version: int) -> RolloutBatch | None:
    """The step's trajectories, sampled with weights `version`: each leader its share, joined on every rank; or those
    that are on disk. None, on every rank, when one was asked to stop before they were complete."""
    batch = run.config.batch
    prompts = run.prompts.prompts_at(run.config.run.seed, step, batch.prompts)
    with run.timers("stored_rollouts"):
        stored = run.rollouts.load(step, prompts, str(version))
    if stored is not None:
        return stored
    rollouts = _rollouts(run, prompts, batch.samples_per_prompt, version, log_step=step)
    if rollouts is not None:
        with run.timers("stored_rollouts"):
            run.rollouts.save(step, prompts, str(version), rollouts)
    return rollouts


def learn(run: Training, rollouts: RolloutBatch) -> dict[str, float]:
    """Advantages, packing and all optimiser steps on one batch of rollouts."""
    algorithm = run.config.algorithm
    with run.timers("pack"):
        advantages = group_advantages(rollouts.rewards, rollouts.groups, algorithm.advantage, algorithm.normalise_std)
        parts = mini_batches(
            rollouts,
            advantages,
            batch=run.config.batch,
            weighting=algorithm.weighting,
            domains=len(run.prompts.domains),
            layout=run.policy.layout,
        )
    metrics = optimise(
        run.policy,
        run.objective,
        parts,
        StepRouting(run.policy, algorithm, run.objective.uses_experts, rollouts),
        epochs=run.config.batch.epochs,
        temperature=run.config.rollout.temperature,
        timers=run.timers,
        kernels=algorithm.kernels,
    )
    return _rollout_summary(rollouts, run.prompts.domains) | metrics


def publish(run: Training, version: int, probe: RolloutBatch | None) -> None:
    """Send the weights to the engines as `version` and compare what an engine then says with the trainer."""
    layout = run.policy.layout
    if run.publisher is None or run.generator is None:
        return
    with run.timers("publish"), together(layout, f"publishing weights {version}"):
        run.publisher.publish(run.policy.export_weights(), str(version))
    every = run.config.weight_sync.verify_every
    if probe is not None and every and version % every == 0:
        with run.timers("verify"):
            verify_publication(run.policy, run.generator.sampler, probe, run.config.weight_sync, version)


def evaluate(run: Training, step: int) -> dict[str, float]:
    """Sampled accuracy on held-out prompts with the weights of `step`; the metrics recorded."""
    evaluation = run.config.evaluation
    prompts = run.prompts.held_out(evaluation.prompts) if evaluation.prompts else []
    if not prompts or run.generator is None:
        return {}
    with run.timers("evaluate"):
        rollouts = _rollouts(run, prompts, evaluation.samples_per_prompt, step, log_step=None)
    assert rollouts is not None, "nobody stops an evaluation"
    summary = _rollout_summary(rollouts, run.prompts.domains)
    run.recorder.record("eval", step, summary)
    return summary


def _asked_to_stop(run: Training) -> bool:
    return run.policy.layout.any_rank(run.stop())


def _save(run: Training, done: int, measured: Mapping[str, float]) -> None:
    with run.timers("checkpoint"), run.turns.training(publishes=False):
        run.checkpoints.save(run.policy, done, prompts=run.prompts.state(), measured=measured)


def _complete_save(run: Training, wait: bool) -> None:
    with run.timers("checkpoint"):
        run.rollouts.saved(run.checkpoints.complete(wait))


def _rollouts(
    run: Training, prompts: list[Prompt], count: int, version: int, *, log_step: int | None
) -> RolloutBatch | None:
    """Sample, score and join; None where a request to stop came first, which an evaluation (`log_step` None) does not
    heed."""
    assert run.generator is not None, "rollouts that are replayed are never generated"
    layout = run.policy.layout
    mine = share(range(len(prompts)), layout.data_rank, layout.data_size)
    stop = never if log_step is None else run.stop
    groups: list[RolloutGroup | None] = []
    with run.timers("evaluate_generate" if log_step is None else "generate"), together(layout, "generating rollouts"):
        if layout.is_leader:
            with _kept(run, log_step, prompts, version, mine) as finished:
                missing = [index for index in mine if index not in finished]
                asked = [prompts[index] for index in missing]
                for i, group in run.generator.groups(asked, count, str(version), stop):
                    finished[missing[i]] = group
            groups = [finished.get(index) for index in mine]
    complete = [group for group in groups if group is not None]
    if layout.any_rank(len(complete) < len(groups)):
        return None
    if log_step is not None:
        run.recorder.rollouts(log_step, complete)
    with run.timers("exchange"):
        return layout.gather_rollouts(flatten(complete) if layout.is_leader else None)


def _kept(
    run: Training, step: int | None, prompts: list[Prompt], version: int, mine: Sequence[int]
) -> AbstractContextManager[MutableMapping[int, RolloutGroup]]:
    """Where this leader's finished groups go; those of an evaluation are in memory alone."""
    nowhere: MutableMapping[int, RolloutGroup] = {}
    return nullcontext(nowhere) if step is None else run.rollouts.unfinished(step, prompts, str(version), mine)


def _rollout_summary(rollouts: RolloutBatch, names: Sequence[str]) -> dict[str, float]:
    lengths = rollouts.response_lengths
    summary = {
        "reward/mean": float(rollouts.rewards.mean()),
        "reward/std": float(rollouts.rewards.std()),
        "accuracy": float(rollouts.correct.mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "truncated_share": float(rollouts.truncated.mean()),
        "turns/mean": float(rollouts.turns.mean()),
    }
    for domain in np.unique(rollouts.domains).tolist():
        summary[f"accuracy/{names[domain]}"] = float(rollouts.correct[rollouts.domains == domain].mean())
    return summary


def _throughput(rollouts: RolloutBatch, seconds: Mapping[str, float]) -> dict[str, float]:
    """Times of the phases since the last record, and tokens (prompts included) over all of it."""
    total = seconds["seconds/total"]
    return {
        **seconds,
        "tokens_per_second": len(rollouts.tokens) / total,
        "gate/time_share": seconds["seconds/gate"] / total,
        "gate/reduce_share": seconds["seconds/gate_reduce"] / total,
    }


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)
