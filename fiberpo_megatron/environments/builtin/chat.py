"""The environment "chat" takes prompts from a data set and rewards the answers by a function.

It imports the standard library alone, and pyarrow where the data set is a table; it runs on Python 3.10.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fiberpo_megatron import plugins
from fiberpo_megatron.environments import Conversation, Message, Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.environments.builtin.problems import Fields, Problem
from fiberpo_megatron.environments.builtin.prompt_files import SOLVE_RATE, Filters, PromptFile
from fiberpo_megatron.environments.shuffle import Permutation, derive_key

Reward = Callable[[Task, Turn], "float | Outcome | Awaitable[float | Outcome]"]


def exact(task: Task, turn: Turn) -> Outcome:
    """Return 1 for a response that is the answer, white space at the ends of both aside; 0 for all others."""
    correct = turn.text.strip() == task.answer.strip()
    return Outcome(float(correct), correct=correct)


class Chat(SingleTurn):
    """Offers the prompts of a data set: for training in its order, for evaluation in a fixed pseudo-random order.

    reward: exact: 1 where the stripped response equals the answer; or the import path of a function of yours,
        `package.module:function`, which takes (task, turn) and returns a number or an Outcome. It may be `async`.
    """

    check_all_tasks = True
    _numeric_answers = False
    """Whether an answer without a number is refused."""
    _text_answers = True
    """Whether `exact` needs an answer that is a text; False for a class that scores by something else."""

    def __init__(
        self,
        train: str,
        held_out: str | None = None,
        reward: str = "exact",
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
        """Open the data sets.

        train: the training problems: a file of JSON lines, a parquet file, a pattern or a folder of parquet files, or
            the folder of one split that `save_to_disk` of Hugging Face datasets has written.
        held_out: the problems for evaluation, in the same way; None: this environment is not evaluated.
        prompt: the field of the prompt, which is a text or a list of chat messages.
        answer: the field of the answer. Dots lead into tables, as in "reward_model.ground_truth".
        id: the field of the problem's name; unset: problems are named by their row.
        metadata: fields that are copied into Task.metadata.
        answer_after: the answer is what follows the last occurrence of this text, such as "####" of GSM8K.
        system: the text of a system message, for prompts that have none.
        chat_template: write a text by the tokenizer's chat template, as a user's message.
        chat_template_kwargs: variables of the chat template, as its makers document them (enable_thinking, tools, ...).
        max_turns: turns of the policy in one conversation. Above 1, `retry_message` follows a wrong answer as a user's
            message, and the last answer is scored. A turn that was cut is the last.
        retry_message: what the user says to a wrong answer that is not the last.
        max_characters: problems with longer prompts are left out.
        deduplicate: of equal prompts only the first is used, and no held-out prompt is used for training.
        solve_rates: a file that says how often each training problem was solved: solve_rates.jsonl of a former run, or
            one JSON object a line with `id` and `solve_rate`, or with `id` and `correct`.
        solve_rate_range: the least and the largest solve rate of problems that are used. Problems whose solve rate is
            unknown are used.
        difficulty: a field with a number by which the training problems are ordered, ascending, for a curriculum
            (`curriculum_steps`); or "solve_rate": those that were solved most often come first.
        name: the fixed order of the held-out problems depends on it (and on nothing else).

        Raises ValueError that names the option, or the file and the line or row, with the value and the fix.
        """
        _check_options(max_turns, retry_message, chat_template, system, max_characters)
        self._reward = _reward(reward)
        filters = Filters(max_characters, deduplicate, solve_rates, _range(solve_rate_range, solve_rates), difficulty)
        if difficulty == SOLVE_RATE and solve_rates is None:
            raise ValueError('difficulty = "solve_rate" needs the file `solve_rates`; name it, or name another field')
        if "source" in metadata:
            raise ValueError(
                'metadata names the field "source", but a task\'s metadata holds its file and line under this name; '
                "rename the field in the data set"
            )
        fields = Fields(
            prompt,
            answer,
            id,
            tuple(metadata),
            text_answers=self._text_answers and reward == "exact",
            numeric_answers=self._numeric_answers,
            answer_after=answer_after,
        )
        self._held_out = None
        if held_out is not None:
            self._held_out = _opened(held_out, fields, Filters(max_characters, deduplicate))
        ordered_by = None if difficulty == SOLVE_RATE else difficulty
        self._train = _opened(train, replace(fields, difficulty=ordered_by), filters, self._held_out)
        self.train_size = len(self._train)
        self.held_out_size = 0 if self._held_out is None else len(self._held_out)
        self.single_turn = max_turns == 1
        self.deterministic = reward == "exact"
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        # the word is what earlier versions called this environment: the order of their held-out problems must stay
        self._order = Permutation(max(1, self.held_out_size), derive_key("jsonl", name))
        self._system = system
        self._chat_template = chat_template
        self._max_turns = max_turns
        self._retry_message = retry_message

    def train(self, index: int) -> Task:
        """Return the problem at `index`, in the order of the file or of the difficulty."""
        problem = self._train[index]
        return self._task(problem, str(problem.row) if self._train.moved else None)

    def held_out(self, index: int) -> Task:
        """Return a problem for evaluation; the first few are a fair sample of all."""
        assert self._held_out is not None, "there is no held-out problem"
        problem = self._held_out[self._order(index)]
        return self._task(problem, str(problem.row))  # its place in the file, as sampling seeds want it

    def score(self, task: Task, turn: Turn) -> Any:
        """Return what the reward function says about an answer."""
        return self._reward(task, turn)

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        """Ask again after wrong answers, at most up to `max_turns` answers."""
        turn = await policy.say(task.prompt)
        outcome = await self._outcome(task, turn)
        for _ in range(self._max_turns - 1):
            solved = outcome.reward > 0 if outcome.correct is None else outcome.correct
            if solved or turn.truncated:
                break
            try:
                turn = await policy.say({"role": "user", "content": self._retry_message})
            except ValueError:  # nothing can follow: the turn ended with another token than the template's
                break
            outcome = await self._outcome(task, turn)
        return outcome

    async def _outcome(self, task: Task, turn: Turn) -> Outcome:
        outcome = self.score(task, turn)
        if inspect.isawaitable(outcome):
            outcome = await outcome
        return outcome if isinstance(outcome, Outcome) else Outcome(outcome)

    def _task(self, problem: Problem, default_id: str | None) -> Task:
        prompt: str | Sequence[Message] = problem.prompt
        if isinstance(prompt, str) and self._chat_template:
            prompt = [{"role": "user", "content": prompt}]
        if self._system is not None and not isinstance(prompt, str):
            prompt = _with_system(prompt, self._system)
        metadata = {"source": problem.source, **problem.metadata}
        return Task(prompt, problem.answer, metadata, default_id if problem.id is None else problem.id)


def _with_system(prompt: Sequence[Message], text: str) -> Sequence[Message]:
    """Return a chat with a system message at its beginning, unless it has one."""
    if any(message["role"] == "system" for message in prompt):
        return prompt
    return [{"role": "system", "content": text}, *prompt]


def _opened(path: str, fields: Fields, filters: Filters, apart_from: PromptFile | None = None) -> PromptFile:
    found = PromptFile(path, fields, filters, apart_from)
    if found.left_out:
        taken = ", ".join(f"{name} left out {count}" for name, count in found.left_out.items())
        print(f"{path}: {len(found)} prompts are used; {taken}", file=sys.stderr)  # in the worker's log
    return found


def _reward(reward: str) -> Reward:
    """Return the function that an option names. Raises ValueError with the fix."""
    if reward == "exact":
        return exact
    if reward == "math_verify":
        raise ValueError('reward = "math_verify" is an environment of its own today: write use = "math"')
    if not isinstance(reward, str) or ":" not in reward:
        raise ValueError(
            f'reward = {reward!r} is unknown; use "exact", or the import path of a function, "package.module:function"'
        )
    function = plugins.find("rewards", reward, "reward").target
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        raise ValueError(f"reward = {reward!r} must be a function that takes (task, turn)") from None
    return function


def _range(given: Any, solve_rates: str | None) -> tuple[float, float]:
    """Return two solve rates. Raises ValueError with the fix."""
    numbers = [value for value in given if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(given) != 2 or len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1] <= 1:
        raise ValueError(f"solve_rate_range = {given!r} must be two numbers, 0 <= least <= largest <= 1")
    if solve_rates is None and tuple(numbers) != (0.0, 1.0):
        raise ValueError(f"solve_rate_range = {given!r} needs the file `solve_rates`; name it, or leave the range out")
    return float(numbers[0]), float(numbers[1])


def _check_options(max_turns: Any, retry_message: Any, chat_template: bool, system: Any, max_characters: Any) -> None:
    for name, value in (("max_turns", max_turns), ("max_characters", max_characters)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} = {value!r} must be a whole number of at least 1")
    for name, value in (("retry_message", retry_message), ("system", system)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{name} = {value!r} must be a text that is not empty")
    for name, needed in ((f"max_turns = {max_turns}", max_turns > 1), (f"system = {system!r}", system is not None)):
        if needed and not chat_template:
            raise ValueError(
                f"{name} and chat_template = false: only a chat template says where a message ends; set "
                f"chat_template = true or leave {name.split()[0]} out"
            )
