"""The environment "math" takes problems from a data set and compares final answers, mostly by the math-verify library.

It imports the standard library alone; math-verify runs in a process of its own (`math_answers.py`).
"""

from __future__ import annotations

from typing import Any

from fiberpo_megatron.environments import Outcome, Task, Turn
from fiberpo_megatron.environments.builtin.chat import Chat
from fiberpo_megatron.environments.builtin.final_answers import last_boxed, last_number
from fiberpo_megatron.environments.builtin.math_answers import MathVerifier

MODES = ("math-verify", "boxed", "last-number")


class Math(Chat):
    """Offers the problems of a data set as `chat` does, and rewards an answer that is mathematically right with 1.

    mode: which part of a response is its answer. boxed: the last `\\boxed{...}`, compared by math-verify; a response
        without one is wrong. last-number: the last number of the response, which must equal the last one of the answer;
        this needs no library. math-verify: the last box, else the last formula or number, as the library finds it.
    timeout_s: seconds that one comparison by math-verify may take; one that takes longer is a wrong answer.

    The other options are those of `chat`.
    """

    not_options = ("reward",)

    def __init__(
        self,
        train: str,
        held_out: str | None = None,
        mode: str = "math-verify",
        timeout_s: float = 5.0,
        **options: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r} is unknown; use one of {', '.join(MODES)}")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 86_400:
            raise ValueError(f"timeout_s = {timeout_s!r} must be a number of seconds above 0 and below 86400")
        self._mode, self._numeric_answers = mode, mode == "last-number"
        self._verifier = None if mode == "last-number" else MathVerifier(timeout_s)
        super().__init__(
            train,
            held_out,
            **options,
        )

    def score(self, task: Task, turn: Turn) -> Outcome:
        """Return 1 for a right answer, 0 for a wrong one."""
        correct = self._is_right(task.answer, turn.text)
        return Outcome(float(correct), correct=correct)

    def _is_right(self, answer: str, response: str) -> bool:
        if self._verifier is None:
            return last_number(response) == last_number(answer)
        if self._mode == "boxed":
            box = last_boxed(response)
            return box is not None and (box.strip() == answer.strip() or self._verifier(answer, f"\\boxed{{{box}}}"))
        return self._verifier(answer, response)
