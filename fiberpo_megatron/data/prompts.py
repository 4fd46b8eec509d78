"""This module computes the training stream over several environments, as a pure function of (seed, step).

Nothing here keeps state or looks into a task: every rank, and a resumed run, computes the same places from the step
number. `data/encoding.py` turns the tasks at these places into tokens.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from fiberpo_megatron.environments import Split
from fiberpo_megatron.environments.shuffle import Permutation, derive_key
from fiberpo_megatron.types import RolloutBatch

SCHEDULE_SLOTS = 1000
"""Length of the repeating schedule that mixes domains: weights are met to 1/1000."""


@dataclass(frozen=True)
class Place:
    """This says where a task stands."""

    domain: int
    """Index of the environment."""
    split: Split
    index: int
    """Position in the split."""


@dataclass(frozen=True)
class Domain:
    """This is what the stream has to know about an environment."""

    name: str
    weight: float
    train_size: int
    held_out_size: int
    curriculum_steps: int | None = None
    """Steps in which the training tasks are drawn from easy to hard; None draws from all of them."""
    curriculum_start: float = 1.0
    """Part of the tasks from which the first of these steps draws."""

    def training_index(self, position: int, seed: int, step: int, drawn: int) -> int:
        """Return the training task of a step.

        position: tasks drawn from this domain before it, since the first step. drawn: tasks drawn from it before in
        this step. During the curriculum a step draws without replacement from the first `window` tasks; afterwards the
        stream is that of `shuffled`.
        """
        window = self.window(step)
        if window is None:
            return self.shuffled(position, "train", seed)
        epoch, place = divmod(drawn, window)
        return Permutation(window, derive_key("curriculum", seed, self.name, step, epoch))(place)

    def window(self, step: int) -> int | None:
        """Return how many tasks, from the easiest on, a step draws from; None for all.

        The part grows linearly with the step, as in competence-based curriculum learning (arXiv:1903.09848).
        """
        if self.curriculum_steps is None or step >= self.curriculum_steps:
            return None
        part = self.curriculum_start + (1 - self.curriculum_start) * step / self.curriculum_steps
        return max(1, round(part * self.train_size))

    def refill_index(self, position: int, seed: int, step: int) -> int:
        """Return the training task at `position` of the endless stream of a step's refills."""
        size = self.window(step) or self.train_size
        epoch, place = divmod(position, size)
        return Permutation(size, derive_key("refills", seed, self.name, step, epoch))(place)

    def shuffled(self, position: int, *key: object) -> int:
        """Return the training index at `position` of the endless stream of `key`, which is shuffled anew in every
        epoch."""
        epoch, place = divmod(position, self.train_size)
        return Permutation(self.train_size, derive_key(*key, self.name, epoch))(place)


class PromptSets:
    """These are the places of a run's prompts in its environments, mixed by weight.

    sets = PromptSets([Domain("sums", 1.0, train_size=900, held_out_size=100)])
    places = sets.prompts_at(seed=0, step=3, count=32)
    """

    def __init__(self, domains: Sequence[Domain]) -> None:
        self._domains = tuple(domains)
        self._schedule = Schedule([domain.weight for domain in domains])

    @property
    def domains(self) -> tuple[str, ...]:
        """These are the names of the environments, in the order of `Place.domain`."""
        return tuple(domain.name for domain in self._domains)

    @property
    def train_size(self) -> int:
        """This is the number of different training tasks, all environments together."""
        return sum(domain.train_size for domain in self._domains)

    @property
    def held_out_size(self) -> int:
        """This is the number of different held-out tasks, all environments together."""
        return sum(domain.held_out_size for domain in self._domains)

    def prompts_at(self, seed: int, step: int, count: int) -> list[Place]:
        """Return the `count` training places of step `step` (from 0): domains are mixed by weight, and each is shuffled
        without replacement and anew in every epoch, unless it has a curriculum (`Domain.training_index`). Equal on
        every rank; keep `count` the same over a run."""
        places: list[Place] = []
        drawn: Counter[int] = Counter()
        for position in range(step * count, (step + 1) * count):
            number, before = self._schedule(position)
            index = self._domains[number].training_index(before, seed, step, drawn[number])
            places.append(Place(number, "train", index))
            drawn[number] += 1
        return places

    def refills_at(self, seed: int, step: int, count: int) -> list[Place]:
        """Return the training places of the first `count` refills of a step, which take the places of prompts whose
        groups a filter has dropped. They are mixed like the step's prompts, and each domain is shuffled without
        replacement and anew in every step. Equal on every rank."""
        schedule, places = self._refill_schedule(step), list[Place]()
        drawn: Counter[int] = Counter()
        begin = int.from_bytes(derive_key("refills", seed, step)) % SCHEDULE_SLOTS  # not always with the same domain
        for position in range(begin, begin + count):
            number, _ = schedule(position)
            places.append(Place(number, "train", self._domains[number].refill_index(drawn[number], seed, step)))
            drawn[number] += 1
        return places

    def _refill_schedule(self, step: int) -> "Schedule":
        """Return how the refills of a step are mixed."""
        return self._schedule

    def examples_at(self, seed: int, step: int, count: int) -> list[Place]:
        """Return places as `prompts_at` does, in another order, for supervised steps."""
        places = []
        for position in range(step * count, (step + 1) * count):
            number, before = self._schedule(position)
            places.append(Place(number, "train", self._domains[number].shuffled(before, "sft", seed)))
        return places

    def held_out(self, count: int) -> list[Place]:
        """Return the same `count` held-out places in every run (fewer if there are fewer), domains in turn."""
        turns = [
            (position, number)
            for number, domain in enumerate(self._domains)
            for position in range(min(count, domain.held_out_size))
        ]
        return [Place(number, "held_out", position) for position, number in sorted(turns)[:count]]

    def observe(
        self, rollouts: RolloutBatch, looked_at: Mapping[int, tuple[int, int]] | None = None
    ) -> dict[str, float]:
        """Look at a step's rollouts and return metrics. A fixed mix learns nothing from them.

        `looked_at`: where a filter has dropped groups, right answers and answers of all groups by domain.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold beside the step: nothing for a fixed mix."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`; ValueError when it is a curriculum's."""
        if state:
            raise ValueError(
                'the checkpoint was written with data.curriculum = "adaptive"; resume with it, or start in another run '
                "folder"
            )


class Schedule:
    """This says which domain a stream position draws from, and how many of its prompts came before, in O(log) time.

    Slots of a cycle of SCHEDULE_SLOTS are shared out by largest remainder (at least one each), spread evenly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = _apportion(weights, SCHEDULE_SLOTS if len(weights) > 1 else 1)
        # Slot k of a domain with n slots wants to stand at (k + 1/2) / n of the cycle.
        wishes = sorted(((k + 0.5) / n, number) for number, n in enumerate(shares) for k in range(n))
        self._slots = [number for _, number in wishes]
        self._places: list[list[int]] = [[] for _ in weights]
        for slot, number in enumerate(self._slots):
            self._places[number].append(slot)

    def __call__(self, position: int) -> tuple[int, int]:
        """(domain, position inside that domain's stream) of a stream position."""
        cycle, slot = divmod(position, len(self._slots))
        number = self._slots[slot]
        places = self._places[number]
        return number, cycle * len(places) + bisect_left(places, slot)


def _apportion(weights: Sequence[float], slots: int) -> list[int]:
    """Whole slots in proportion to the weights, at least one each (the sum may then exceed `slots`)."""
    quotas = [weight / sum(weights) * slots for weight in weights]
    shares = [floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - quotas[i], i))
    for number in by_remainder[: slots - sum(shares)]:
        shares[number] += 1
    return [max(1, share) for share in shares]
