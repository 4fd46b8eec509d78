"""This module says which trajectories may be sampled with which weights. It is pure arithmetic.

A ticket is a place in the endless stream of prompts: step s owns the tickets from s n up to (s + 1) n. Once the weights
of version v are published, exactly the tickets of steps up to v + `staleness` may run. The weights that train a ticket
of step s are version s, so that no token is older than `staleness` versions, and what is trained on has the lengths of
the data: no trajectory is preferred because it was short. A step trains on all of its tickets, or on those that a
filter chooses in their order (`filter.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tickets:
    """These are the tickets of a run. `staleness` 0 is the synchronous loop.

    `per_step`: prompts of a step. `steps`: training steps of the run.
    """

    per_step: int
    staleness: int
    steps: int

    def __post_init__(self) -> None:
        if self.per_step < 1 or self.staleness < 0 or self.steps < 0:
            raise ValueError(
                f"tickets with {self.per_step} prompts a step, staleness {self.staleness} and {self.steps} steps; "
                "pass at least 1 prompt, and no negative number"
            )

    def of_step(self, step: int) -> range:
        """Return the tickets that a step owns."""
        return range(step * self.per_step, (step + 1) * self.per_step)

    def admitted(self, version: int) -> int:
        """Return the last step whose tickets may run once the weights `version` are published; -1 without any step."""
        return min(version + self.staleness, self.steps - 1)

    def versions(self, step: int) -> range:
        """Return the versions of the weights that may sample tokens of a step."""
        return range(max(0, step - self.staleness), step + 1)
