"""The environment "math" takes problems from a data set and compares final answers, mostly by the math-verify library.

It imports the standard library alone; math-verify runs in a process of its own (`math_answers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """

    def __init__(
        self,
        train: str,
        held_out: str | None = None,
        mode: str = "math-verify",
        timeout_s: float = 5.0,
        prompt: str = "prompt",
        answer: str = "answer",
        id: str | None = None,
        metadata: Sequence[str] = (),
        answer_after: str | None = None,
        system: str | None = None,
        chat_template: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_turns: int = 1,
        retry_message: str = "That is not right. Try again.",
        max_characters: int | None = None,
        deduplicate: bool = False,
        solve_rates: str | None = None,
        solve_rate_range: tuple[float, float] = (0.0, 1.0),
        difficulty: str | None = None,
        name: str = "prompts",
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
            prompt=prompt,
            answer=answer,
            id=id,
            metadata=metadata,
            answer_after=answer_after,
            system=system,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            max_turns=max_turns,
            retry_message=retry_message,
            max_characters=max_characters,
            deduplicate=deduplicate,
            solve_rates=solve_rates,
            solve_rate_range=solve_rate_range,
            difficulty=difficulty,
            name=name,
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
