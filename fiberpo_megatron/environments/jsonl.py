"""The environment "jsonl" takes problems with known answers from files.

A line holds a JSON object with `prompt` (a text, or chat messages with `role` and `content`) and `answer`. A response
is right or wrong and earns 1 or 0. This module imports the standard library alone and runs on Python 3.10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fiberpo_megatron.environments import Conversation, Message, Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.environments.math_answers import MathVerifier
from fiberpo_megatron.environments.shuffle import Permutation, derive_key
from fiberpo_megatron.printable import printable


@dataclass(frozen=True)
class Problem:
    """Holds one line of a file."""

    index: int
    """Its position among the problems of the file."""
    prompt: str | tuple[dict[str, str], ...]
    """A text, or chat messages."""
    answer: str
    source: str
    """File and line, for error messages."""


def exact(answer: str, response: str) -> bool:
    """Return whether the response is the answer, white space at the ends of both aside."""
    return response.strip() == answer.strip()


class Jsonl(SingleTurn):
    """Offers the problems of files in file order, the held-out ones in a fixed pseudo-random order.

    train: the file with the training problems.
    held_out: the file with the problems for evaluation; None: this environment is not evaluated.
    reward: exact: the stripped response equals the answer; math_verify: the math-verify library compares them.
    chat_template: write a text by the tokenizer's chat template, as a user's message.
    chat_template_kwargs: variables of the chat template, as its makers document them (enable_thinking, tools, ...).
    max_turns: turns of the policy in one conversation. Above 1, `retry_message` follows a wrong answer as a user's
        message, and the last answer is scored. A turn that was cut is the last.
    retry_message: what the user says to a wrong answer that is not the last.
    name: the fixed order of the held-out problems depends on it (and on nothing else).

    Raises ValueError that names the option, or file and line, with the value and the fix.
    """

    check_all_tasks = True
    deterministic = True

    def __init__(
        self,
        train: str,
        held_out: str | None = None,
        reward: str = "exact",
        chat_template: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_turns: int = 1,
        retry_message: str = "That is not right. Try again.",
        name: str = "jsonl",
    ) -> None:
        if reward not in ("exact", "math_verify"):
            raise ValueError(f'reward = {reward!r} is unknown; use "exact" or "math_verify"')
        if not isinstance(max_turns, int) or isinstance(max_turns, bool) or max_turns < 1:
            raise ValueError(f"max_turns = {max_turns!r} must be a whole number of at least 1")
        if not isinstance(retry_message, str) or not retry_message:
            raise ValueError(f"retry_message = {retry_message!r} must be a text that is not empty")
        if max_turns > 1 and not chat_template:
            raise ValueError(
                f"max_turns = {max_turns} and chat_template = false: only a chat template says where a turn ends; set "
                "chat_template = true or max_turns = 1"
            )
        self._train = read_jsonl(Path(train))
        self._held_out = read_jsonl(Path(held_out)) if held_out else []
        refuse_overlap(self._train, self._held_out)
        self.train_size = len(self._train)
        self.held_out_size = len(self._held_out)
        self.single_turn = max_turns == 1
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._order = Permutation(max(1, self.held_out_size), derive_key("jsonl", name))
        self._right = MathVerifier() if reward == "math_verify" else exact
        self._chat_template = chat_template
        self._max_turns = max_turns
        self._retry_message = retry_message

    def train(self, index: int) -> Task:
        """Return the problem of the line at `index`."""
        return self._task(self._train[index])

    def held_out(self, index: int) -> Task:
        """Return a problem for evaluation; the first few are a fair sample of all."""
        problem = self._held_out[self._order(index)]
        return replace(self._task(problem), id=str(problem.index))  # its place in the file, as sampling seeds want it

    def score(self, task: Task, turn: Turn) -> Outcome:
        """Return 1 for a right answer, 0 for a wrong one."""
        correct = self._right(task.answer, turn.text)
        return Outcome(float(correct), correct=correct)

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        """Ask again after wrong answers, at most up to `max_turns` answers."""
        turn = await policy.say(task.prompt)
        outcome = self.score(task, turn)
        for _ in range(self._max_turns - 1):
            if outcome.correct or turn.truncated:
                break
            try:
                turn = await policy.say({"role": "user", "content": self._retry_message})
            except ValueError:  # nothing can follow: the turn ended with another token than the template's
                break
            outcome = self.score(task, turn)
        return outcome

    def _task(self, problem: Problem) -> Task:
        prompt: str | Sequence[Message] = problem.prompt
        if isinstance(prompt, str) and self._chat_template:
            prompt = [{"role": "user", "content": prompt}]
        return Task(prompt, problem.answer, {"source": problem.source})


def read_jsonl(path: Path) -> list[Problem]:
    """Return the problems of a file, one JSON object per line; blank lines are skipped.

    Raises ValueError that names file and line, the value and the fix.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(
            f"cannot read the prompt file {path}: {error.strerror}; correct the path in the options of the environment"
        ) from None
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            problems.append(_parse_line(line, len(problems), f"{path}, line {number}"))
    if not problems:
        raise ValueError(f"{path} holds no prompts; write one JSON object a line with `prompt` and `answer`")
    return problems


def _parse_line(line: bytes, index: int, source: str) -> Problem:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of brackets
        raise ValueError(f"{source}: not a JSON object ({error}): {_short(line.decode())}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected a JSON object with `prompt` and `answer`, got {_short(record)}")
    return Problem(index, _parse_prompt(record, source), _parse_answer(record, source), source)


def _parse_prompt(record: dict[str, object], source: str) -> str | tuple[dict[str, str], ...]:
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return _checked_text(prompt, "prompt", source)
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return tuple(
            {key: _checked_text(message[key], f"prompt[{number}].{key}", source) for key in ("role", "content")}
            for number, message in enumerate(prompt)
        )
    raise ValueError(
        f"{source}: `prompt` must be a non-empty string or a list of chat messages with string `role` and "
        f"`content`, got {_short(prompt)}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _parse_answer(record: dict[str, object], source: str) -> str:
    answer = record.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return _checked_text(answer, "answer", source)
    raise ValueError(f"{source}: `answer` must be a non-empty string or a number, got {_short(answer)}")


def _checked_text(text: str, field: str, source: str) -> str:
    """Return the text. Raises ValueError for half a character, which JSON can express and no encoding can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: `{field}` holds the lone surrogate {text[error.start]!a} at character {error.start}, half of a "
            f"character that was cut; write the whole character, or leave it out: {_short(text)}"
        ) from None
    return text


def refuse_overlap(train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    """Raise ValueError if a held-out prompt is a training prompt, since its accuracy would measure memory."""
    seen = {json.dumps(problem.prompt): problem for problem in train}
    shared = [(seen[key], problem) for problem in held_out if (key := json.dumps(problem.prompt)) in seen]
    if shared:
        first, second = shared[0]
        raise ValueError(
            f"{len(shared)} held-out prompt(s) are also training prompts, first {second.source} = "
            f"{first.source}: {_short(second.prompt)}; remove them from one of the files"
        )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= 120 else f"{text[:120]}...")
