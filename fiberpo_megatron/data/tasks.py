"""Problems of each kind of task as text: what is asked, what is right, and which problems are held out.

A problem set is a random-access sequence. The procedural ones (addition, sorting) compute a problem from its
position, so that a space of 10^12 problems costs nothing. A fixed pseudo-random permutation of the space
(the same for all seeds) splits it into train and held-out problems.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Protocol

from fiberpo_megatron.data.settings import AdditionTask, JsonlTask, SortTask
from fiberpo_megatron.data.shuffle import Permutation, derive_key

Task = AdditionTask | SortTask | JsonlTask
Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One question before tokenisation."""

    index: int
    """Procedural: number in the task's whole space. From a file: position among the file's problems."""
    prompt: str | tuple[Message, ...]
    """Text, or chat messages."""
    answer: str
    source: str
    """Where it came from, for error messages (file and line, or the task)."""


class ProblemSet(Protocol):
    """Train and held-out problems of one domain; problems of the two never coincide."""

    train_size: int
    held_out_size: int

    def train(self, position: int) -> Problem:
        """Problem at `position` of range(train_size)."""
        ...

    def held_out(self, position: int) -> Problem:
        """Problem at `position` of range(held_out_size); the first few are a fair sample of all."""
        ...


class AdditionProblems:
    """`34+58=` -> `092`. Both orders of two different operands fall on the same side of the split, so that a
    held-out sum was never seen in the other order; a number plus itself is always a training problem."""

    def __init__(self, task: AdditionTask) -> None:
        self.task = task
        self.numbers = 10**task.digits
        self.pairs = self.numbers * (self.numbers - 1) // 2
        self.order = Permutation(self.pairs, derive_key("addition", task.digits))
        self.held_out_size = 2 * (self.pairs // task.held_out_every)
        self.train_size = 2 * self.pairs - self.held_out_size + self.numbers

    def train(self, position: int) -> Problem:
        if position < self.numbers:
            return self._problem(position, position)
        held_out = self.held_out_size // 2
        flip, place = divmod(position - self.numbers, self.pairs - held_out)
        return self._pair(held_out + place, flip)

    def held_out(self, position: int) -> Problem:
        flip, place = divmod(position, self.held_out_size // 2)
        return self._pair(place, flip)

    def _pair(self, place: int, flip: int) -> Problem:
        """Different numbers at `place` of the fixed order of all pairs; flip 0 and 1 give both orders."""
        pair = self.order(place)
        large = _triangle_row(pair)
        small = pair - large * (large - 1) // 2
        return self._problem(small, large) if (place + flip) % 2 else self._problem(large, small)

    def _problem(self, first: int, second: int) -> Problem:
        digits = self.task.digits
        return Problem(
            index=first * self.numbers + second,
            prompt=f"{first:0{digits}d}+{second:0{digits}d}=",
            answer=f"{first + second:0{digits + 1}d}",
            source=f"task {self.task.name!r}",
        )


def _triangle_row(number: int) -> int:
    """Largest r with r (r - 1) / 2 <= number: pair (small, large) is number large (large - 1) / 2 + small."""
    return (1 + isqrt(1 + 8 * number)) // 2


class SortProblems:
    """`s:40213=` -> `01234`."""

    def __init__(self, task: SortTask) -> None:
        self.task = task
        size = 10**task.length
        self.order = Permutation(size, derive_key("sort", task.length))
        self.held_out_size = size // task.held_out_every
        self.train_size = size - self.held_out_size

    def train(self, position: int) -> Problem:
        return self._problem(self.order(position + self.held_out_size))

    def held_out(self, position: int) -> Problem:
        return self._problem(self.order(position))

    def _problem(self, index: int) -> Problem:
        digits = f"{index:0{self.task.length}d}"
        return Problem(index, f"s:{digits}=", "".join(sorted(digits)), f"task {self.task.name!r}")


class JsonlProblems:
    """Problems of files. Held-out ones are put into a fixed pseudo-random order (files are often sorted)."""

    def __init__(self, task: JsonlTask) -> None:
        self.task = task
        self._train = read_jsonl(task.train)
        self._held_out = read_jsonl(task.held_out) if task.held_out else []
        refuse_overlap(self._train, self._held_out)
        self.train_size = len(self._train)
        self.held_out_size = len(self._held_out)
        self.order = Permutation(max(1, self.held_out_size), derive_key("jsonl", task.name))

    def train(self, position: int) -> Problem:
        return self._train[position]

    def held_out(self, position: int) -> Problem:
        return self._held_out[self.order(position)]


def build_problem_set(task: Task) -> ProblemSet:
    """Problem set of a task; reads the files of a JSONL task (ValueError names file, line, value, fix)."""
    if isinstance(task, AdditionTask):
        return AdditionProblems(task)
    if isinstance(task, SortTask):
        return SortProblems(task)
    return JsonlProblems(task)


def read_jsonl(path: Path) -> list[Problem]:
    """Problems of a file, one JSON object a line; blank lines are skipped. ValueError names file and line."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(
            f"cannot read the prompt file {path}: {error.strerror}; correct the path in data.tasks"
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
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not a JSON object ({error}): {_short(line.decode())}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected a JSON object with `prompt` and `answer`, got {_short(record)}")
    return Problem(index, _parse_prompt(record, source), _parse_answer(record, source), source)


def _parse_prompt(record: dict[str, object], source: str) -> str | tuple[Message, ...]:
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return tuple({"role": message["role"], "content": message["content"]} for message in prompt)
    raise ValueError(
        f"{source}: `prompt` must be a non-empty string or a list of chat messages with string `role` and "
        f"`content`, got {_short(prompt)}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _parse_answer(record: dict[str, object], source: str) -> str:
    answer = record.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return answer
    raise ValueError(f"{source}: `answer` must be a non-empty string or a number, got {_short(answer)}")


def refuse_overlap(train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    """ValueError if a held-out prompt is a training prompt: its accuracy would measure memory."""
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
    return text if len(text) <= 120 else f"{text[:120]}..."
