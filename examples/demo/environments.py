"""This module holds the demo's tasks, addition and sorting, character by character. They are environments like any
that you write.

Each computes a task from its index, so that a space of 10^12 tasks costs nothing. A fixed pseudo-random permutation of
the space (the same for all seeds) splits it into training and held-out tasks.
"""

from math import isqrt

from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.environments.shuffle import Permutation, derive_key


class Exact(SingleTurn):
    """The answer must be right character by character, apart from white space at its ends."""

    def score(self, task: Task, turn: Turn) -> Outcome:
        correct = turn.text.strip() == task.answer
        return Outcome(float(correct), correct=correct)


class Addition(Exact):
    """Asks for sums of two numbers: `34+58=` is answered by `092`.

    Both orders of two different operands fall on the same side of the split, so that a held-out sum was never seen in
    the other order; a number plus itself is always a training task.
    """

    def __init__(self, digits: int = 2, held_out_every: int = 10) -> None:
        """`digits`: of each operand, 1 to 6. Every `held_out_every`-th pair is kept for evaluation."""
        if not 1 <= digits <= 6:
            raise ValueError(f"digits = {digits}; use 1 to 6")
        if held_out_every < 2:
            raise ValueError(f"held_out_every = {held_out_every}; use at least 2")
        self.digits = digits
        self.numbers = 10**digits
        self.pairs = self.numbers * (self.numbers - 1) // 2
        self.order = Permutation(self.pairs, derive_key("addition", digits))
        self.held_out_size = 2 * (self.pairs // held_out_every)
        self.train_size = 2 * self.pairs - self.held_out_size + self.numbers

    def train(self, index: int) -> Task:
        if index < self.numbers:
            return self._task(index, index)
        held_out = self.held_out_size // 2
        flip, place = divmod(index - self.numbers, self.pairs - held_out)
        return self._pair(held_out + place, flip)

    def held_out(self, index: int) -> Task:
        flip, place = divmod(index, self.held_out_size // 2)
        return self._pair(place, flip)

    def _pair(self, place: int, flip: int) -> Task:
        """Different numbers at `place` of the fixed order of all pairs; flip 0 and 1 give both orders."""
        pair = self.order(place)
        large = _triangle_row(pair)
        small = pair - large * (large - 1) // 2
        return self._task(small, large) if (place + flip) % 2 else self._task(large, small)

    def _task(self, first: int, second: int) -> Task:
        digits = self.digits
        prompt, answer = f"{first:0{digits}d}+{second:0{digits}d}=", f"{first + second:0{digits + 1}d}"
        return Task(prompt, answer, id=str(first * self.numbers + second))


class Sort(Exact):
    """Asks for digits in order: `s:40213=` is answered by `01234`."""

    def __init__(self, length: int = 5, held_out_every: int = 10) -> None:
        """`length`: digits to sort, 2 to 16. Every `held_out_every`-th task is kept for evaluation."""
        if not 2 <= length <= 16:
            raise ValueError(f"length = {length}; use 2 to 16")
        if held_out_every < 2:
            raise ValueError(f"held_out_every = {held_out_every}; use at least 2")
        self.length = length
        size = 10**length
        self.order = Permutation(size, derive_key("sort", length))
        self.held_out_size = size // held_out_every
        self.train_size = size - self.held_out_size

    def train(self, index: int) -> Task:
        return self._task(self.order(index + self.held_out_size))

    def held_out(self, index: int) -> Task:
        return self._task(self.order(index))

    def _task(self, number: int) -> Task:
        digits = f"{number:0{self.length}d}"
        return Task(f"s:{digits}=", "".join(sorted(digits)), id=str(number))


def _triangle_row(number: int) -> int:
    """Largest r with r (r - 1) / 2 <= number: pair (small, large) is number large (large - 1) / 2 + small."""
    return (1 + isqrt(1 + 8 * number)) // 2
