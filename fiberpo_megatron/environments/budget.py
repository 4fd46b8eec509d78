"""This module bounds the time that an environment may work on the trajectories of one step."""

RESERVED = 0.5
"""Share of a budget that is kept for calls which are quick. A call that is cut may cost its worker, and the start of
the next one counts as well, so this share has to be large."""


class StepBudget:
    """Holds what is left of the time in which an environment may work on one step.

    The clock runs while the environment has at least one trajectory in its hands, however many are worked on at the
    same time. Half of the budget goes to whoever comes first, each call up to its own deadline. The other half is
    divided among the calls that have not ended: each has the same part, and one that takes longer is cut. So answers
    that are scored quickly keep their scores, whatever others have taken. When nothing is left every call is cut.

    seconds: the budget. workers: how many calls run at the same time. calls: how many calls the step makes.
    """

    def __init__(self, seconds: float, *, workers: int, calls: int) -> None:
        self.seconds = seconds
        self._workers = workers
        self._calls = calls
        self._spent = 0.0

    def spend(self, seconds: float) -> None:
        """Count time in which the environment has worked."""
        self._spent += seconds

    def end_call(self) -> None:
        """Note that one of the calls has ended, with or without a result."""
        self._calls -= 1

    @property
    def exhausted(self) -> bool:
        """Return whether nothing is left."""
        return self._spent >= self.seconds

    @property
    def part_s(self) -> float | None:
        """Return the seconds that each remaining call may take; None as long as only its own deadline counts."""
        if self._spent < (1 - RESERVED) * self.seconds:
            return None
        return max(0.0, self.seconds - self._spent) * self._workers / max(1, self._calls)

    def describe(self) -> str:
        """Return the words for a call that is cut."""
        return (
            f"the environment may work on one step for step_budget_s = {self.seconds:g} s, and this was spent; have it "
            "do less, give it more workers, or raise step_budget_s"
        )
