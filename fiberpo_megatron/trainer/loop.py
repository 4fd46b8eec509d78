"""This module is the main loop: it takes rollouts, learns from them and publishes the weights.

Every rank runs it; every collaborator is passed in, so that the same function trains a toy policy with a fake engine in
the tests and a Megatron model with SGLang on a cluster.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.evaluation.results import measure
from fiberpo_megatron.evaluation.settings import DEFAULT_SET, EvaluationSet
from fiberpo_megatron.fibration.levels import STATE_KEY
from fiberpo_megatron.interfaces import (
    AdvantageEstimator,
    Checkpoints,
    Objective,
    Policy,
    Recorder,
    RolloutSource,
)
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.advantages import estimate
from fiberpo_megatron.trainer.batch import mini_batches, without_truncated
from fiberpo_megatron.trainer.expectation import Expected, nothing_expected
from fiberpo_megatron.trainer.figures import MakeFigures, no_figures
from fiberpo_megatron.trainer.importance import Weighing
from fiberpo_megatron.trainer.importance_settings import MismatchConfig
from fiberpo_megatron.trainer.lags import lag_metrics
from fiberpo_megatron.trainer.optimise import optimise
from fiberpo_megatron.trainer.overlong import with_overlong_penalty
from fiberpo_megatron.trainer.profiling import NoProfiles, Profiles
from fiberpo_megatron.trainer.settings import AlgorithmConfig, BatchConfig
from fiberpo_megatron.trainer.step_dump import StepDumps
from fiberpo_megatron.trainer.step_routing import StepRouting
from fiberpo_megatron.trainer.stop import Stopped, StoppedByAlarm, never
from fiberpo_megatron.trainer.terms import Terms
from fiberpo_megatron.trainer.token_records import TokenRecords
from fiberpo_megatron.types import RolloutBatch


@dataclass(frozen=True)
class Training:
    """It is everything that the loop works with."""

    policy: Policy
    source: RolloutSource
    objective: Objective
    advantage: AdvantageEstimator
    recorder: Recorder
    checkpoints: Checkpoints
    timers: PhaseTimers
    batch: BatchConfig
    algorithm: AlgorithmConfig
    temperature: float
    """`rollout.temperature`."""
    steps: int
    """Training steps of the whole run."""
    evaluate_every: int = 0
    """Evaluate after so many steps; 0: only before the first and after the last."""
    save_every: int = 1
    """Save after so many steps; 0: only after the last."""
    stop: Callable[[], bool] = never
    """Whether this rank was asked to stop."""
    expected: Expected = nothing_expected
    """What a plan expects of a step that had these trajectories, as metrics beside the measured ones."""
    figures: MakeFigures = no_figures
    """Gives the figures of pretraining of a step: operations per second, memory, energy, goodput, slow ranks."""
    max_response_tokens: int | None = None
    """`rollout.max_response_tokens`: what the weighting "constant" divides by where `algorithm.normaliser` is unset."""
    dumps: StepDumps | None = None
    """Writes what the objective saw in the steps of `debug.dump_step`."""
    terms: Terms = field(default_factory=Terms)
    """What is added to the objective."""
    records: TokenRecords | None = None
    """Writes what happened to single tokens of each step."""
    profiles: Profiles | NoProfiles = field(default_factory=NoProfiles)
    """Answers requests of `fiberpo profile`."""
    evaluation_sets: Sequence[EvaluationSet] = ()
    """Sets that are evaluated beside the default one."""
    staleness: int = 0
    """`rollout.staleness`."""
    live: bool = True
    """Whether engines of this run sample. What is replayed was sampled by another run's weights, whatever its version
    is called, so that it says nothing about engines and no limit of a mismatch applies."""


def train(run: Training, start: int = 0) -> None:
    """Train from step `start` (0, or the step of the checkpoint that was loaded) to `run.steps`.

    Raises Stopped, on all ranks at the same step and after saving, when any rank was asked to stop: after a step, or
    before its first optimiser step, in the middle of its generation too. Raises StoppedByAlarm in the same way when an
    alarm stops the run.
    """
    source, saved = run.source, start
    source.publish(start)
    if start == 0:
        evaluate(run, 0)
    for step in range(start, run.steps):
        done = step + 1
        run.profiles.boundary(step)
        rollouts = source.take(step)
        if rollouts is None or _asked_to_stop(run):
            if step > saved:
                _save(run, step, {})
            _complete_save(run, wait=True)
            raise _stopped(run, step)
        metrics = learn(run, rollouts, step)
        source.publish(done)
        metrics |= source.observe(rollouts)
        expected, seconds = run.expected(rollouts), run.timers.read()
        measured_work = run.figures(step, rollouts, seconds, metrics.get("kept_forward_share", 0.0))
        figures = {**_throughput(rollouts, seconds), **measured_work}
        run.recorder.record("train", step, {**metrics, **figures, **expected})
        # one without trajectories has not measured by what a checkpoint may be the best
        measured = {f"train/{name}": value for name, value in metrics.items()} if len(rollouts.lengths) else {}
        measured |= {f"eval/{name}": value for name, value in evaluate(run, done, due_sets(run, done)).items()}
        stopping = _asked_to_stop(run)
        if stopping or _due(done, run.save_every, run.steps):
            _save(run, done, measured)  # last: a step whose checkpoint exists has been recorded
            saved = done
        _complete_save(run, wait=stopping or done == run.steps)
        if stopping and done < run.steps:
            raise _stopped(run, done)
    run.profiles.end()


def learn(run: Training, rollouts: RolloutBatch, version: int) -> dict[str, float]:
    """Take all optimiser steps on one batch of rollouts, from weights `version` on, and return metrics.

    A step all of whose trajectories are left out (`algorithm.truncated`) takes no optimiser step, nor does one of whose
    groups none is useful (`batch.filter`).
    """
    if not len(rollouts.lengths):
        return {}
    summary = rollout_summary(rollouts, run.source.domains) | lag_metrics(rollouts, version)
    rollouts, overlong = with_overlong_penalty(rollouts, run.algorithm.overlong, run.max_response_tokens)
    summary |= overlong
    advantages = estimate(run.advantage, rollouts)
    records = None
    if run.records is not None:
        kept = ~rollouts.truncated if run.algorithm.truncated == "leave_out" else None
        records = run.records.begin(version, run.policy.layout, rollouts, kept, run.objective.name)
    if run.algorithm.truncated == "leave_out":
        rollouts, advantages, left_out = without_truncated(rollouts, advantages)
        summary |= left_out
        if not len(rollouts.lengths):
            return summary
    weighting = run.algorithm.weighting or run.objective.weighting
    normaliser = run.algorithm.normaliser or run.max_response_tokens
    with run.timers("pack"):
        parts = mini_batches(
            rollouts,
            advantages,
            batch=run.batch,
            weighting=weighting,
            normaliser=normaliser,
            domains=len(run.source.domains),
            layout=run.policy.layout,
            version=version,
            states=STATE_KEY in run.objective.keys,
        )
    dump = None
    if run.dumps is not None:
        facts = {"weighting": weighting, "temperature": run.temperature, "domains": list(run.source.domains)}
        facts |= {"normaliser": normaliser} if weighting == "constant" else {}
        dump = run.dumps.begin(version, run.policy.layout, rollouts, run.objective, facts)
    weighing = Weighing(
        version,
        run.algorithm.importance.method_at(run.staleness),
        run.algorithm.importance,
        run.algorithm.mismatch if run.live else MismatchConfig(warn=0, mask=0, stop=0),
        weighting,
        normaliser,
        rollouts,
        run.source.quarantine,
    )
    with run.source.training(publishes=True):
        metrics = optimise(
            run.policy,
            run.objective,
            parts,
            StepRouting(run.policy, run.algorithm, run.objective.uses_experts, rollouts, version),
            epochs=run.batch.epochs,
            temperature=run.temperature,
            timers=run.timers,
            dump=dump,
            weighing=weighing,
            terms=run.terms,
            records=records,
        )
    run.terms.update(run.policy.layout, metrics, len(rollouts.sequences))
    return summary | metrics


def due_sets(run: Training, done: int) -> list[EvaluationSet | None]:
    """Return the sets that are evaluated after `done` steps; None stands for the default one."""
    every = [one.every_steps if one.every_steps is not None else run.evaluate_every for one in run.evaluation_sets]
    default: list[EvaluationSet | None] = [None] if _due(done, run.evaluate_every, run.steps) else []
    return default + [one for one, steps in zip(run.evaluation_sets, every) if _due(done, steps, run.steps)]


def evaluate(run: Training, step: int, sets: Sequence[EvaluationSet | None] | None = None) -> dict[str, float]:
    """Measure the policy of `step` steps on evaluation sets (all by default); return what was recorded.

    None among `sets` stands for the default set. The results of single prompts are written as well.
    """
    summary: dict[str, float] = {}
    results: dict[str, dict[str, object]] = {}
    layout = run.policy.layout
    for one in [None, *run.evaluation_sets] if sets is None else sets:
        found = run.source.held_out(step, one)
        if found is None:
            continue
        if one is None:
            metrics, settings = rollout_summary(found.rollouts, run.source.domains), {}
        else:
            mine = json.dumps(measure(one, found.prompts)) if layout.rank == 0 else None
            metrics, settings = json.loads(layout.share_text(mine)), one.model_dump(mode="json", exclude_none=True)
        summary |= metrics
        name = DEFAULT_SET if one is None else one.name
        results[name] = {"settings": settings, "metrics": metrics, "prompts": found.prompts}
    if summary:
        run.recorder.record("eval", step, summary)
        run.recorder.evaluation(step, results)
    return summary


def _asked_to_stop(run: Training) -> bool:
    return run.policy.layout.any_rank(run.stop() or run.recorder.stopping() is not None)


def _stopped(run: Training, done: int) -> Stopped:
    """Return what every rank raises: the alarm is known to the rank that logs alone."""
    run.profiles.end()
    alarms = [alarm for alarm in run.policy.layout.gather_json(run.recorder.stopping()) if alarm is not None]
    return StoppedByAlarm(done, alarms[0]) if alarms else Stopped(done)


def _save(run: Training, done: int, measured: Mapping[str, float]) -> None:
    with run.timers("checkpoint"), run.source.training(publishes=False):
        state = run.terms.state()
        run.checkpoints.save(run.policy, done, prompts=run.source.state(), measured=measured, terms=state)


def _complete_save(run: Training, wait: bool) -> None:
    with run.timers("checkpoint"):
        run.source.saved(run.checkpoints.complete(wait))


def rollout_summary(rollouts: RolloutBatch, names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of a batch of trajectories; `names` are those of the domains."""
    sequences, rollouts = rollouts.sequences, rollouts.per_trajectory()
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
    if len(np.unique(rollouts.groups)) < len(rollouts.groups):  # alone in its group, a trajectory equals itself
        summary["groups/zero_variance_share"] = _equal_share(rollouts)
    if sequences.max() > 1:
        summary |= {"branches/mean": float(sequences.mean()), "branches/max": float(sequences.max())}
    if rollouts.failed.any():
        summary["failed_share"] = float(rollouts.failed.mean())
    summary |= {f"reward/{name}/mean": _mean(values) for name, values in rollouts.reward_parts.items()}
    return summary | {
        f"environment/{name}/mean": _mean(values) for name, values in rollouts.environment_metrics.items()
    }


def _equal_share(rollouts: RolloutBatch) -> float:
    """Return the share of groups all of whose trajectories have the same reward: they teach nothing."""
    begins = np.flatnonzero(np.diff(rollouts.groups, prepend=-1))
    least, most = (ufunc.reduceat(rollouts.rewards, begins) for ufunc in (np.minimum, np.maximum))
    return float((least == most).mean())


def _mean(values: NDArray[np.float32]) -> float:
    """Mean over the trajectories that have the value."""
    return float(values[~np.isnan(values)].mean(dtype=np.float64))


def _throughput(rollouts: RolloutBatch, seconds: Mapping[str, float]) -> dict[str, float]:
    """Times of the phases since the last record, and tokens (prompts included) over all of it."""
    total = seconds["seconds/total"]
    return {
        **seconds,
        "idle/trainer_seconds": seconds.get("seconds/generate", 0.0) + seconds.get("seconds/drain", 0.0),
        "tokens_per_second": len(rollouts.tokens) / total,
        "gate/time_share": seconds.get("seconds/gate", 0.0) / total,  # a step may have nothing to train on
        "gate/reduce_share": seconds.get("seconds/gate_reduce", 0.0) / total,
    }


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)
