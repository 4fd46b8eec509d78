"""This module chooses the groups that a step trains on where groups without a difference are replaced. It is pure
arithmetic: the choice depends on how groups ended, and on nothing else.

A step owns the tickets of `owned` prompts, and wants `wanted` useful groups. It takes the first useful ones in the
order of their tickets. Where fewer tickets are useful, refills take their places: refill n is drawn once it is certain
that fewer than `wanted` of all that come before it are useful, so that which refills are drawn does not depend on which
group ends first either. A group's number is its place in this order: tickets from 0, refills from `owned`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fiberpo_megatron.types import RolloutGroup

FilterBy = Literal["correct", "reward"]
"""What has to differ in a group: which answers are right, or the rewards."""


class Ended(NamedTuple):
    """It is what the choice has to know of a group that has ended."""

    useful: bool
    domain: int
    right: int
    answers: int
    """Trajectories of the group, `right` of which are right; 0 where the environment failed on all of them."""


@dataclass(frozen=True)
class Choice:
    """It is what is known about a step's groups at some time."""

    chosen: tuple[int, ...]
    """Numbers of the useful groups that come before the first one that has not ended, `wanted` at most."""
    looked_at: int
    """Groups from the first on that the choice depends on, once it is certain."""
    certain: bool
    """Whether the step trains on `chosen`, whatever the other groups do."""
    refills: int
    """Further refills that are needed in any case."""


@dataclass(frozen=True)
class Filter:
    """It is the filter of a run.

    `on`: what has to differ in a useful group. `wanted`: groups of a step; `owned`: prompts of which it owns the
    tickets; `most_refills`: further prompts of a step at most.
    """

    on: FilterBy
    wanted: int
    owned: int
    most_refills: int

    def __post_init__(self) -> None:
        if not 1 <= self.wanted <= self.owned or self.most_refills < 0:
            raise ValueError(
                f"a filter that takes {self.wanted} groups of {self.owned} prompts and {self.most_refills} refills; "
                "pass at least 1 group, as many prompts, and no negative number"
            )

    def ended(self, group: RolloutGroup) -> Ended:
        """Return what the choice has to know of a group."""
        right = [bool(trajectory.correct) for trajectory in group.trajectories]
        values = right if self.on == "correct" else [trajectory.reward for trajectory in group.trajectories]
        return Ended(len(set(values)) > 1, group.prompt.domain, sum(right), len(right))

    def choose(self, ended: Mapping[int, Ended], drawn: int) -> Choice:
        """Return the choice from the groups that have ended, by number, of the `drawn` ones that were begun."""
        chosen: list[int] = []
        first = next((number for number in range(drawn) if number not in ended), drawn)
        for number in range(first):
            if ended[number].useful:
                chosen.append(number)
                if len(chosen) == self.wanted:
                    return Choice(tuple(chosen), number + 1, True, 0)
        possible = sum(number not in ended or ended[number].useful for number in range(drawn))
        refills = max(0, min(self.wanted - possible, self.owned + self.most_refills - drawn))
        return Choice(tuple(chosen), first, first == drawn and refills == 0, refills)


@dataclass(frozen=True)
class Filtered:
    """It is what the filter of one step saw and did: the groups whose number is in `chosen` are trained on, others
    below `looked_at` were dropped, and tickets from there on were aborted or not looked at."""

    wanted: int
    owned: int
    drawn: int
    chosen: tuple[int, ...]
    looked_at: int
    solved: Mapping[int, tuple[int, int]]
    """Right answers and answers of the groups that were looked at, by domain."""

    @classmethod
    def of(cls, filter: Filter, ended: Mapping[int, Ended], choice: Choice, drawn: int) -> "Filtered":
        """Return the record of a choice that is certain."""
        solved: dict[int, tuple[int, int]] = {}
        for number in range(choice.looked_at):
            _, domain, right, answers = ended[number]
            before = solved.get(domain, (0, 0))
            solved[domain] = before[0] + right, before[1] + answers
        return cls(filter.wanted, filter.owned, drawn, choice.chosen, choice.looked_at, dict(sorted(solved.items())))

    @property
    def answers(self) -> int:
        """Return the trajectories that were looked at."""
        return sum(answers for _, answers in self.solved.values())

    def metrics(self) -> dict[str, float]:
        """Return the step's metrics."""
        dropped = self.looked_at - len(self.chosen)
        found = {
            "filter/dropped_groups": float(dropped),
            "filter/refilled_groups": float(self.drawn - self.owned),
            "filter/aborted_groups": float(self.drawn - self.looked_at),
            "filter/missing_share": 1.0 - len(self.chosen) / self.wanted,
            "filter/steps_without_training": float(not self.chosen),
        }
        right = sum(right for right, _ in self.solved.values())
        return found | ({"filter/accuracy": right / self.answers} if self.answers else {})

    def as_json(self) -> dict[str, Any]:
        """Return JSON values for a file of stored rollouts."""
        return {**vars(self), "solved": [[domain, *counts] for domain, counts in self.solved.items()]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Filtered":
        """Return the inverse of `as_json`."""
        solved = {domain: (right, answers) for domain, right, answers in values["solved"]}
        return cls(**{**values, "chosen": tuple(values["chosen"]), "solved": solved})


def news(rows: Iterable[Sequence[Any]]) -> dict[int, Ended]:
    """Return groups that have ended, by number, from JSON rows (number, *Ended)."""
    return {number: Ended(*facts) for number, *facts in rows}
