"""This module is an adaptive mix of domains: it takes more prompts from those that the policy solves half of the time.

A group of samples teaches nothing where all are right or all are wrong: the variance of a reward that is 1 with
probability a is a (1 - a). A domain's share of a step's prompts is therefore

    share_d  ~  weight_d  max(floor, 4 a_d (1 - a_d)),       a_d <- (1 - rate) a_d + rate (share of right answers)

with a_d the domain's running solve rate, 1/2 at first. Shares become whole numbers of prompts by largest credit, and
what a step rounds off is credited to the next. All state is in `Mix` and in what was drawn but not yet observed: with
`rollout.staleness` S a step is drawn once the rollouts of the steps up to S + 1 before it were seen. The prompts of
a step are a pure function of (seed, step, state), and the state of the rollouts seen, so that every rank and a resumed
run have the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any, NamedTuple

import numpy as np

from fiberpo_megatron.data.prompts import Domain, Place, PromptSets, Schedule
from fiberpo_megatron.data.settings import DataConfig
from fiberpo_megatron.types import RolloutBatch


@dataclass(frozen=True)
class Mix:
    """This is the state of a mix; each field has one number per domain."""

    solve_rates: tuple[float, ...]
    """Running share of right answers."""
    drawn: tuple[int, ...]
    """Prompts drawn so far: where the domain's shuffled stream goes on."""
    credit: tuple[float, ...]
    """Prompts owed by rounding; they sum to 0."""


class Draw(NamedTuple):
    """It is what one step draws; each field has one number per domain."""

    counts: tuple[int, ...]
    """Prompts of the step."""
    before: tuple[int, ...]
    """Prompts drawn by all steps before it."""


def shares(mix: Mix, weights: Sequence[float], least: float) -> list[float]:
    """Return each domain's share of the prompts; the shares sum to 1. `least` is the floor of 4 a (1 - a)."""
    wanted = [weight * max(least, 4 * a * (1 - a)) for weight, a in zip(weights, mix.solve_rates, strict=True)]
    return [value / sum(wanted) for value in wanted]


def allot(mix: Mix, part: Sequence[float], count: int) -> tuple[list[int], list[float]]:
    """Return (whole numbers of prompts per domain that sum to `count`, credit after them)."""
    owed = [credit + share * count for credit, share in zip(mix.credit, part, strict=True)]
    counts = [max(0, floor(value)) for value in owed]
    while sum(counts) != count:
        step = 1 if sum(counts) < count else -1
        among = [number for number, n in enumerate(counts) if step > 0 or n > 0]
        counts[max(among, key=lambda number: (step * (owed[number] - counts[number]), -number))] += step
    return counts, [value - n for value, n in zip(owed, counts)]


class AdaptivePrompts(PromptSets):
    """These are prompt sets whose mix follows the solve rates. The weight of an environment is its share where all
    are solved alike."""

    def __init__(self, domains: Sequence[Domain], rate: float, least: float) -> None:
        super().__init__(domains)
        self._rate, self._least = rate, least
        count = len(self.domains)
        self.mix = Mix((0.5,) * count, (0,) * count, (0.0,) * count)
        self._unobserved: dict[int, Draw] = {}
        """What steps have drawn whose rollouts were not observed yet."""

    def prompts_at(self, seed: int, step: int, count: int) -> list[Place]:
        """Return the `count` places of a step. A step that was not asked for before draws next, with the solve rates of
        the rollouts that were observed by then; asking for it again returns the same."""
        draw = self._unobserved.get(step)
        if draw is None:
            counts, credit = allot(self.mix, self._shares(), count)
            draw = self._unobserved[step] = Draw(tuple(counts), self.mix.drawn)
            drawn = tuple(before + n for before, n in zip(self.mix.drawn, counts))
            self.mix = replace(self.mix, drawn=drawn, credit=tuple(credit))
        wishes = sorted(((k + 0.5) / n, number, k) for number, n in enumerate(draw.counts) for k in range(n))
        places = []
        for _, number, k in wishes:
            index = self._domains[number].training_index(draw.before[number] + k, seed, step, k)
            places.append(Place(number, "train", index))
        return places

    def observe(
        self, rollouts: RolloutBatch, looked_at: Mapping[int, tuple[int, int]] | None = None
    ) -> dict[str, float]:
        """Take the rollouts of the first step that was drawn and not observed into account; return the step's shares
        and the new solve rates as metrics. Groups that a filter has dropped count: they are what was solved always or
        never."""
        step = min(self._unobserved)
        counts = self._unobserved[step].counts
        rates = list(self.mix.solve_rates)
        for number, (right, answers) in (self._solved(rollouts, counts) if looked_at is None else looked_at).items():
            if answers:
                rates[number] += self._rate * (right / answers - rates[number])
        self.mix = replace(self.mix, solve_rates=tuple(rates))
        del self._unobserved[step]
        metrics = {f"curriculum/share/{name}": n / sum(counts) for name, n in zip(self.domains, counts)}
        return metrics | {f"curriculum/solve_rate/{name}": rate for name, rate in zip(self.domains, rates)}

    def _solved(self, rollouts: RolloutBatch, counts: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Return the right answers and the answers of each domain in a step that drew so many prompts of each."""
        rollouts = rollouts.per_trajectory()
        first = np.unique(rollouts.groups, return_index=True)[1]
        seen = np.bincount(rollouts.domains[first], minlength=len(self.domains)).tolist()
        # fewer where an environment failed and its trajectories were dropped
        assert all(s <= c for s, c in zip(seen, counts)), f"rollouts of {seen} prompts, the curriculum chose {counts}"
        answers = np.bincount(rollouts.domains, minlength=len(self.domains)).tolist()
        right = np.bincount(rollouts.domains, rollouts.correct, minlength=len(self.domains)).tolist()
        return dict(enumerate(zip(map(int, right), answers)))

    def _refill_schedule(self, step: int) -> Schedule:
        """Refills are mixed like the prompts that the step drew, whatever was observed since."""
        return Schedule(self._unobserved[step].counts)

    def state(self) -> dict[str, Any]:
        """Return JSON values for a checkpoint."""
        return {
            "domains": list(self.domains),
            "solve_rates": list(self.mix.solve_rates),
            "drawn": list(self.mix.drawn),
            "credit": list(self.mix.credit),
            "unobserved": [[step, *map(list, draw)] for step, draw in sorted(self._unobserved.items())],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`; ValueError when it is of other domains, or of no curriculum."""
        if state.get("domains") != list(self.domains):
            raise ValueError(
                f"the checkpoint's curriculum is over the domains {state.get('domains')}, this run has "
                f"{list(self.domains)}; resume with the environments and the data.curriculum that wrote it"
            )
        self.mix = Mix(tuple(state["solve_rates"]), tuple(state["drawn"]), tuple(state["credit"]))
        unobserved = state.get("unobserved", [])  # earlier versions had none
        self._unobserved = {step: Draw(tuple(counts), tuple(before)) for step, counts, before in unobserved}

    def _shares(self) -> list[float]:
        return shares(self.mix, [domain.weight for domain in self._domains], self._least)


def build_prompts(data: DataConfig, domains: Sequence[Domain]) -> PromptSets:
    """Return the prompt sets of [data] over these environments, in their fixed or adaptive mix."""
    if data.curriculum == "none":
        return PromptSets(domains)
    return AdaptivePrompts(domains, data.curriculum_rate, data.curriculum_floor)
