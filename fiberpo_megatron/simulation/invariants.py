"""This module has what must hold in every simulated training, whatever befalls it: each invariant is a function that
raises Broken, and is named by the function."""

import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fiberpo_megatron.rollout.filter import Filtered
from fiberpo_megatron.simulation.engines import Token
from fiberpo_megatron.types import RolloutBatch, Trajectory


class Broken(BaseException):
    """An invariant does not hold. No code of production catches it."""

    def __init__(self, what: str, name: str | None = None) -> None:
        super().__init__(what)
        self.name = name or sys._getframe(1).f_code.co_name
        """The invariant."""


def trained_once(lineage: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Require that a ticket is trained on at most once in a lineage: the steps whose training is in one policy."""
    steps = [step for step, _ in lineage]
    if len(set(steps)) < len(steps):
        raise Broken(f"the weights were trained on the steps {steps}")
    numbers = [number for _, of_step in lineage for number in of_step]
    if len(set(numbers)) < len(numbers):
        raise Broken(f"the weights were trained on the prompts {numbers}")


def lag_bounded(batch: RolloutBatch, step: int, staleness: int) -> None:
    """Require that no token that a step trains on is older than `rollout.staleness` versions, or newer than the step's
    weights."""
    versions = batch.weight_versions[batch.response_mask]
    if len(versions) and not step - staleness <= versions.min() <= versions.max() <= step:
        raise Broken(f"step {step} trains on tokens of the versions {sorted(set(versions.tolist()))}")


def tokens_sampled(
    batch: RolloutBatch,
    sampled: Mapping[tuple[int, ...], Iterable[Token]],
    published: Mapping[str, Iterable[str]],
) -> None:
    """Require that every token that is trained on was sampled behind the tokens before it, with the log-prob beside it,
    by weights that the run had published under the version beside it."""
    for sequence, position in _responses(batch):
        where = batch.offsets[sequence] + position
        before = tuple(batch.tokens[batch.offsets[sequence] : where].tolist())
        version = str(batch.weight_versions[where])
        found = [
            one
            for one in sampled.get(before, ())
            if (one.token, np.float32(one.log_prob)) == (batch.tokens[where], batch.rollout_log_probs[where])
        ]
        if not any(one.version == version and one.digest in published.get(version, ()) for one in found):
            raise Broken(
                f"token {position} of sequence {sequence} is said to come from the weights {version}, but "
                f"{sorted(found) if found else 'no engine'} sampled it"
            )


def verified_first(batch: RolloutBatch, sampled: Mapping[tuple[int, ...], Iterable[Token]]) -> None:
    """Require that no token is trained on that an engine sampled before it was verified."""
    for sequence, position in _responses(batch):
        where = batch.offsets[sequence] + position
        before = tuple(batch.tokens[batch.offsets[sequence] : where].tolist())
        found = [one for one in sampled.get(before, ()) if one.token == batch.tokens[where]]
        if found and not any(one.verified for one in found):
            raise Broken(f"token {position} of sequence {sequence} was sampled by an engine before it was verified")


def no_ticket_lost(
    batch: RolloutBatch, asked: Sequence[int], samples: int, filtered: Filtered | None, found: Sequence[int]
) -> None:
    """Require that a step trains on all of its tickets in order, with all samples; with a filter, on those it chose.
    `asked`: numbers of the step's prompts, refills behind them; `found`: those of the batch."""
    expected = list(asked) if filtered is None else [asked[number] for number in filtered.chosen]
    if list(found) != expected or len(batch.per_trajectory().lengths) != samples * len(expected):
        raise Broken(
            f"{len(batch.per_trajectory().lengths)} trajectories of the prompts {list(found)} are trained on, and not "
            f"{samples} of each of {expected}"
        )


def kept_is_used(found: Mapping[int, Sequence[object]], kept: Mapping[int, Sequence[object]]) -> None:
    """Require that a resumed run trains on what was on disk when the process before it ended. `kept` has nothing that a
    failed sync may have left off the disk of a machine that was lost: production has warned of it."""
    for number in sorted(found.keys() & kept.keys()):
        if found[number] != kept[number]:
            raise Broken(f"prompt {number} was on disk as {kept[number]}, but {found[number]} is trained on")


def committed_is_used(found: bytes, committed: bytes | None, step: int) -> None:
    """Require that a step whose trajectories were on disk as a whole is trained on the same ones again."""
    if committed is not None and found != committed:
        raise Broken(f"step {step} is trained on other trajectories than had been written for it")


def resume_repeats(found: Sequence[str], expected: Sequence[str]) -> None:
    """Require the weights of the run that nothing befell after every step, where tokens do not depend on timing."""
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            raise Broken(f"the weights after {step} steps are {ours}, and {theirs} where nothing befell the run")


def all_steps_trained(trained: Sequence[int], steps: int, skipped: Iterable[int]) -> None:
    """Require that a run ends once it trained on all steps in order, except those of which a filter left nothing."""
    expected = [step for step in range(steps) if step not in set(skipped)]
    if list(trained) != expected:
        raise Broken(f"the run ended after it had trained on the steps {list(trained)}, and not {expected}")


def ends_for_a_reason(error: BaseException, reasons: Sequence[str]) -> None:
    """Require that a run ends early only because of what befell it."""
    if not reasons:
        raise Broken(f"the run ended although nothing had befallen it: {type(error).__name__}: {error}") from error


def every_wait_ends(what: str) -> None:
    """Require that every wait ends: no process waits for what will never come, or beyond all of its deadlines."""
    raise Broken(what)


INVARIANTS = (
    trained_once,
    lag_bounded,
    tokens_sampled,
    verified_first,
    no_ticket_lost,
    kept_is_used,
    committed_is_used,
    resume_repeats,
    all_steps_trained,
    ends_for_a_reason,
    every_wait_ends,
)


def group_facts(trajectories: Sequence[Trajectory]) -> list[object]:
    """Return what must not change about the trajectories of a prompt."""
    return [
        (one.completion.token_ids, one.completion.log_probs.tolist(), one.completion.weight_spans, one.reward)
        for one in trajectories
    ]


def _responses(batch: RolloutBatch) -> Iterable[tuple[int, int]]:
    """Yield (sequence, position in it) of every token that was sampled."""
    for sequence in range(len(batch.lengths)):
        begin, end = batch.offsets[sequence : sequence + 2].tolist()
        for position in np.flatnonzero(batch.response_mask[begin:end]).tolist():
            yield sequence, position
