"""This module makes trajectories with log ratios that bring every gate into every state, all of it from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from fiberpo_megatron.fibration import Objective
from fiberpo_megatron.fibration.levels import STATE_KEY
from fiberpo_megatron.trainer.batch import token_keys, token_labels, token_weights
from fiberpo_megatron.trainer.states import state_ids
from fiberpo_megatron.trainer.step_file import Tokens
from fiberpo_megatron.types import RolloutBatch

VERSION = 6
"""Version of the trainer's weights; rollouts come from this one and two earlier ones."""
ENGINES = 3
SHAPES = ((1, 2, 2), (4, 2, 2), (2, 3, 6), (8, 4, 24))
"""(groups, samples of each, most response tokens): the rollback of a gate is wide where it has few tokens."""
SHIFTS = (0.04, 0.1, 0.25)
"""How far trajectories move as a whole: standard deviation of their mean log ratio."""
ROUNDS = 8
"""Most batches that are drawn for each shape and shift; fewer if all states have come about before."""
MOST = 6
"""Batches that are kept."""


@dataclass(frozen=True)
class Problem:
    """Holds trajectories, and how far each of their tokens has moved from the old policy."""

    rollouts: RolloutBatch
    advantages: NDArray[np.float32]
    """[B], equal in all branches of a trajectory."""
    log_ratio: NDArray[np.float64]
    """[N], of which those at response tokens count."""
    expert_share: NDArray[np.float64]
    """[N, P]"""
    domains: int

    @property
    def normaliser(self) -> float:
        """Return what the weighting "constant" divides by: the longest response's tokens."""
        return float(self.rollouts.per_trajectory().response_lengths.max())

    @property
    def old_log_probs(self) -> NDArray[np.float64]:
        """Return log-probs [N] from which the log ratios lead to probabilities below 1, spread over four nats."""
        spread = 0.6180339887498949 * np.arange(len(self.log_ratio)) % 1.0  # the golden ratio: no two alike
        return -np.maximum(self.log_ratio, 0.0) - 0.05 - 4.0 * spread

    def tokens(self, weighting: str, dtype: torch.dtype = torch.float32) -> Tokens:
        """Return what an objective sees of all response tokens."""
        rollouts, count = self.rollouts, len(self.rollouts.lengths)
        index = np.flatnonzero(rollouts.response_mask)
        sequence = np.searchsorted(rollouts.offsets, index, side="right") - 1
        weights = token_weights(rollouts.per_trajectory().response_lengths, weighting, self.normaliser)
        keys = token_keys(rollouts, 0, count, self.domains)
        keys[STATE_KEY] = state_ids(rollouts, 0, count)
        return Tokens(
            log_ratio=torch.from_numpy(self.log_ratio[index]).to(dtype),
            advantages=torch.from_numpy(self.advantages[sequence]),
            weights=torch.from_numpy(weights[rollouts.trajectories[sequence]]),
            keys={name: torch.from_numpy(ids[index]) for name, (ids, _) in keys.items()},
            counts={name: number for name, (_, number) in keys.items()},
            labels={name: torch.from_numpy(of) for name, of in token_labels(rollouts, 0, count, VERSION).items()},
            expert_share=torch.from_numpy(self.expert_share[index]),
            old_log_probs=torch.from_numpy(self.old_log_probs[index]).to(dtype),
        )


def draw_problem(
    random: np.random.Generator,
    *,
    groups: int,
    samples: int,
    longest: int,
    domains: int,
    partitions: int,
    vocabulary: int = 64,
    shift: float = 0.15,
    branches: bool = False,
) -> Problem:
    """Draw groups of trajectories with 1 to `longest` response tokens behind prompts of 2 to 6 tokens.

    Responses begin with few different tokens, so that samples of a group share states; every third trajectory is a
    conversation of two turns. With `branches`, the first three samples of four are one trajectory, whose branches go on
    from the first tokens of another one.
    """
    count = groups * samples
    responses = random.integers(1, longest + 1, count)
    responses[0] = longest
    rows: list[NDArray[np.int64]] = []
    masks: list[NDArray[np.bool_]] = []
    joins: list[bool] = []
    for group in range(groups):
        prompt = random.integers(0, vocabulary, random.integers(2, 7))
        for sample in range(samples):
            length = int(responses[group * samples + sample])
            answer = np.where(
                np.arange(length) < 3, random.integers(0, 2, length), random.integers(0, vocabulary, length)
            )
            mask = np.ones(length, bool)
            if sample % 3 == 2 and length > 4:
                mask[length // 2 : length // 2 + 2] = False  # what the environment said between two turns
            joins.append(branches and sample % 4 in (1, 2))
            context = rows[-1][: len(prompt) + 2] if joins[-1] else prompt
            rows.append(np.concatenate([context, answer]))
            masks.append(np.concatenate([np.zeros(len(context), bool), mask]))
    trajectories = np.cumsum(~np.array(joins)) - 1
    lengths = np.array([len(row) for row in rows])
    total = int(lengths.sum())
    rollouts = RolloutBatch.filled(
        tokens=np.concatenate(rows),
        response_mask=np.concatenate(masks),
        lengths=lengths,
        trajectories=trajectories,
        groups=np.arange(count) // samples,
        domains=np.arange(count) // samples % domains,
        weight_versions=np.repeat(VERSION - random.integers(0, 3, count), lengths),
        engines=np.repeat(random.integers(0, ENGINES, count), lengths),
    )
    of_group = np.repeat(np.repeat(random.normal(scale=shift / 2, size=groups), samples), lengths)
    of_trajectory = np.repeat(random.normal(scale=shift, size=count), lengths)
    return Problem(
        rollouts=rollouts,
        advantages=random.normal(size=count).astype(np.float32)[trajectories],
        log_ratio=of_group + of_trajectory + random.normal(scale=random.choice([0.01, 0.05, 0.2]), size=total),
        expert_share=random.dirichlet(np.full(partitions, 0.5), size=total),
        domains=domains,
    )


@dataclass(frozen=True)
class Batch:
    """Holds tokens to certify on, with a name for the page."""

    name: str
    tokens: Tokens
    states: frozenset[str] = frozenset()
    """States of gates and clips that these tokens bring about, by the names of metrics."""


def made_batches(objective: Objective, seed: int, domains: int, partitions: int) -> tuple[list[Batch], list[str]]:
    """Return batches that together bring the gates into as many states as possible, and the states that none does.

    Many batches are drawn; those are kept that add states, the one that adds most first, and at last a longer one with
    extreme log ratios and with tokens of weight 0.
    """
    extreme = _extreme(objective, np.random.default_rng([seed, 1]), domains, partitions)
    drawn: list[Batch] = []
    possible: set[str] = set()
    found = set(extreme.states)
    for number, shape, shift in product(range(ROUNDS), SHAPES, SHIFTS):
        if possible and not possible - found and (shape, shift) == (SHAPES[0], SHIFTS[0]):
            break
        random = np.random.default_rng([seed, *shape, int(1000 * shift), number])
        problem = _shaped(random, shape, shift, domains, partitions)
        tokens = problem.tokens(objective.weighting)
        metrics = _metrics(objective, tokens)
        possible |= _states(metrics, reached=False)
        name = f"{shape[0]} x {shape[1]} trajectories, shift {shift:g}, draw {number} ({len(tokens)} tokens)"
        drawn.append(Batch(name, tokens, frozenset(_states(metrics))))
        found |= drawn[-1].states
    kept: list[Batch] = []
    reached = set(extreme.states)
    while len(kept) < MOST:
        best = max(drawn, key=lambda batch: (len(batch.states - reached), len(batch.tokens)))
        if kept and not best.states - reached:
            break
        kept.append(best)
        reached |= best.states
    return [*kept, extreme], sorted(possible - reached)


def _shaped(random: np.random.Generator, shape: Sequence[int], shift: float, domains: int, partitions: int) -> Problem:
    groups, samples, longest = shape
    return draw_problem(
        random,
        groups=groups,
        samples=samples,
        longest=longest,
        domains=domains,
        partitions=partitions,
        shift=shift,
    )


def _extreme(objective: Objective, random: np.random.Generator, domains: int, partitions: int) -> Batch:
    """A longer batch with what is rare: log ratios at and beyond every clamp, zeros, and tokens of weight 0."""
    problem = draw_problem(random, groups=24, samples=8, longest=60, domains=domains, partitions=partitions)
    tokens = problem.tokens(objective.weighting)
    size = len(tokens)
    log_ratio, advantages, weights = tokens.log_ratio.clone(), tokens.advantages.clone(), tokens.weights.clone()
    places = torch.from_numpy(random.permutation(size)[: size // 8])
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 19.9, -25.0, 79.0, -85.0])
    log_ratio[places] = values.repeat(size)[: len(places)]
    advantages[torch.from_numpy(random.permutation(size)[: size // 20])] = 0.0
    weights[torch.from_numpy(random.permutation(size)[: size // 10])] = 0.0
    tokens = replace(tokens, log_ratio=log_ratio, advantages=advantages, weights=weights)
    return Batch(
        f"24 x 8 trajectories with extreme log ratios and weights of 0 ({size} tokens)",
        tokens,
        frozenset(_states(_metrics(objective, tokens))),
    )


def _metrics(objective: Objective, tokens: Tokens) -> dict[str, float]:
    metrics = tokens.call(objective).metrics
    assert metrics is not None, "the call was asked for metrics"
    return metrics.as_dict()


def _states(metrics: dict[str, float], reached: bool = True) -> set[str]:
    """The states of gates and clips that occur, or all that could."""
    found = {
        name
        for name, share in metrics.items()
        if name.startswith("gate/")
        and name.split("/")[-2] in ("regime", "plus", "minus")
        and (share > 0 or not reached)
        if name.rpartition("/")[2] not in ("mean", "p99")
    }
    clipped = metrics["token/clip_share"]
    return (
        found
        | ({"token/clipped"} if clipped > 0 or not reached else set())
        | ({"token/free"} if clipped < 1 or not reached else set())
    )


def steady(
    problem: Problem, objective: Objective, random: np.random.Generator, tries: int = 30
) -> tuple[Problem, float]:
    """Return the problem with log ratios at which the rounding of log-probs moves no coefficient far.

    Near a kink of a clip or a gate, rounding decides a coefficient, so that two right results may differ. Log ratios
    are drawn until a relative error of 1e-6 moves no coefficient by more than 2e-6 of the largest, or else the best of
    `tries` draws is taken. Also returns by how much it moves them.
    """
    best: tuple[float, Problem] | None = None
    for _ in range(tries):
        tokens = problem.tokens(objective.weighting, torch.float64)
        wanted = tokens.call(objective, metrics=False).gradient
        worst = 0.0
        for _ in range(6):
            noise = torch.from_numpy(random.uniform(-1e-6, 1e-6, len(tokens)))
            moved = replace(tokens, log_ratio=tokens.log_ratio + noise).call(objective, metrics=False).gradient
            worst = max(worst, float((moved - wanted).abs().max() / wanted.abs().max()))
        if best is None or worst < best[0]:
            best = worst, problem
        if worst < 2e-6:
            break
        drift = problem.log_ratio + random.normal(scale=0.03, size=len(problem.log_ratio))
        problem = replace(problem, log_ratio=drift)
    assert best is not None, "at least one draw was tried"
    return best[1], best[0]
