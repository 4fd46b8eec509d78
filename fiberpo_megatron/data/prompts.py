"""Tokenised prompt sets over several domains, and the training stream as a pure function of (seed, step).

Nothing here keeps state: every rank, and a resumed run, computes the same prompts from the step number.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from fiberpo_megatron.data.chat import ChatTemplate
from fiberpo_megatron.data.settings import JsonlTask
from fiberpo_megatron.data.shuffle import Permutation, derive_key
from fiberpo_megatron.data.tasks import Problem, ProblemSet, Task, build_problem_set
from fiberpo_megatron.data.tokenizer import Tokenizer
from fiberpo_megatron.types import Prompt, RolloutBatch

SCHEDULE_SLOTS = 1000
"""Length of the repeating schedule that mixes domains: weights are met to 1/1000."""

TASK_ALPHABET = {"addition": "0123456789+=", "sort": "s:0123456789="}


@dataclass(frozen=True)
class Example:
    """A prompt with its right answer, for supervised warm-up."""

    prompt: Prompt
    target_ids: tuple[int, ...]
    """Tokens of the answer, then the one that ends it: the chat template's end of turn, or the end of the sequence."""


class Domain:
    """One task's problems with their tokens."""

    def __init__(self, task: Task, number: int, tokenizer: Tokenizer, max_prompt_tokens: int) -> None:
        self.task = task
        self.number = number
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.problems: ProblemSet = build_problem_set(task)
        options = task.chat_template_kwargs if isinstance(task, JsonlTask) else {}
        self.chat = ChatTemplate(tokenizer, options) if tokenizer.chat_template else None
        self.uses_chat = False
        self._check()

    def _check(self) -> None:
        """Refuse at the start what would fail at some later step."""
        if isinstance(self.task, JsonlTask):
            problems = [self.problems.train(position) for position in range(self.problems.train_size)]
            for problem in [*problems, *map(self.problems.held_out, range(self.problems.held_out_size))]:
                self.prompt(problem)
            self.uses_chat = any(map(self._is_chat, problems))
            if self.task.max_turns > 1 and self.chat:
                try:
                    self.chat.check_turns()
                except Exception as error:  # templates are programs of the model's makers and raise what they like
                    raise ValueError(f"task {self.task.name!r}: max_turns = {self.task.max_turns}: {error}") from error
            return
        alphabet = TASK_ALPHABET[self.task.kind]
        ids = self.tokenizer.encode(alphabet, add_special_tokens=False)
        seen = self.tokenizer.decode(ids, skip_special_tokens=True)
        if seen.replace(" ", "") != alphabet:
            raise ValueError(
                f"task {self.task.name!r}: the tokenizer turns {alphabet!r} into {seen!r}; use one that "
                f"has these characters (examples/demo/model has one)"
            )
        self.prompt(self.problems.train(0))

    def shuffled(self, position: int, *key: object) -> Problem:
        """Training problem at `position` of the endless stream of `key`: shuffled anew in every epoch."""
        size = self.problems.train_size
        epoch, place = divmod(position, size)
        return self.problems.train(Permutation(size, derive_key(*key, self.task.name, epoch))(place))

    def prompt(self, problem: Problem) -> Prompt:
        """The problem's tokens. ValueError names its file and line."""
        text = self._render(problem)
        # A chat template writes its own special tokens; plain text gets the tokenizer's (such as BOS).
        ids = self.tokenizer.encode(text, add_special_tokens=not self._is_chat(problem))
        if not 1 <= len(ids) <= self.max_prompt_tokens:
            raise ValueError(
                f"{problem.source}: the prompt has {len(ids)} tokens, allowed are 1 to "
                f"data.max_prompt_tokens = {self.max_prompt_tokens}; shorten it or raise the limit: "
                f"{text[:80]!r}"
            )
        return Prompt(problem.index, self.number, tuple(ids), text, problem.answer)

    def example(self, problem: Problem) -> Example:
        """The problem with its right answer, ended as the model is to end it."""
        end = self.chat.end_of_turn if self.chat and self._is_chat(problem) else None
        end = self.tokenizer.eos_token_id if end is None else end
        if end is None:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
        answer = self.tokenizer.encode(problem.answer, add_special_tokens=False)
        return Example(self.prompt(problem), (*answer, end))

    def _is_chat(self, problem: Problem) -> bool:
        """Whether the chat template writes the prompt."""
        return not isinstance(problem.prompt, str) or (isinstance(self.task, JsonlTask) and self.task.chat_template)

    def _render(self, problem: Problem) -> str:
        if isinstance(problem.prompt, str) and not self._is_chat(problem):
            return problem.prompt
        if self.chat is None:
            raise ValueError(
                f"{problem.source}: the prompt needs a chat template but the tokenizer has none; set "
                f"`chat_template = false` for task {self.task.name!r} and write prompts as plain strings, or "
                f"add a chat_template to the model's tokenizer_config.json"
            )
        prompt = problem.prompt
        try:
            return self.chat.prompt([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise ValueError(f"{problem.source}: the chat template refuses the prompt: {error}") from error


class PromptSets:
    """All domains of a run."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self._domains = tuple(domains)
        self._schedule = Schedule([domain.task.weight for domain in domains])

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of `Prompt.domain`."""
        return tuple(domain.task.name for domain in self._domains)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks of the domains, in the order of `Prompt.domain`."""
        return tuple(domain.task for domain in self._domains)

    @property
    def train_size(self) -> int:
        """Different training prompts, all domains together."""
        return sum(domain.problems.train_size for domain in self._domains)

    @property
    def held_out_size(self) -> int:
        """Different held-out prompts, all domains together."""
        return sum(domain.problems.held_out_size for domain in self._domains)

    def prompts_at(self, seed: int, step: int, count: int) -> list[Prompt]:
        """The `count` training prompts of step `step` (from 0): domains mixed by weight, each domain shuffled
        without replacement and anew in every epoch. Equal on every rank; keep `count` the same over a run."""
        return [domain.prompt(problem) for domain, problem in self._stream("train", seed, step, count)]

    def examples_at(self, seed: int, step: int, count: int) -> list[Example]:
        """Like `prompts_at`, with the right answers; another order than `prompts_at` of the same seed."""
        return [domain.example(problem) for domain, problem in self._stream("sft", seed, step, count)]

    def continuation(self, prompt: Prompt, response_ids: Sequence[int], message: str) -> tuple[int, ...] | None:
        """Token ids between the response's last turn and the next one, with the user's `message`; None when the
        response did not end its turn (`ChatTemplate.continuation`)."""
        chat = self._domains[prompt.domain].chat
        return chat.continuation(response_ids, message) if chat else None

    @property
    def ends_of_turn(self) -> tuple[int, ...]:
        """Tokens with which the chat templates in use end an answer."""
        ends = {domain.chat.end_of_turn for domain in self._domains if domain.chat and domain.uses_chat}
        return tuple(sorted(end for end in ends if end is not None))

    def held_out(self, count: int) -> list[Prompt]:
        """The same `count` held-out prompts in every run (fewer if there are fewer), domains in turn."""
        turns = [
            (position, number)
            for number, domain in enumerate(self._domains)
            for position in range(min(count, domain.problems.held_out_size))
        ]
        domains = ((self._domains[number], position) for position, number in sorted(turns)[:count])
        return [domain.prompt(domain.problems.held_out(position)) for domain, position in domains]

    def observe(self, rollouts: RolloutBatch) -> dict[str, float]:
        """See a step's rollouts; metrics. A fixed mix learns nothing from them."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside the step: of a fixed mix nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`; ValueError when it is a curriculum's."""
        if state:
            raise ValueError(
                'the checkpoint was written with data.curriculum = "adaptive"; resume with it, or start in another run '
                "folder"
            )

    def _stream(self, name: str, seed: int, step: int, count: int) -> Iterator[tuple[Domain, Problem]]:
        for position in range(step * count, (step + 1) * count):
            number, place = self._schedule(position)
            domain = self._domains[number]
            yield domain, domain.shuffled(place, name, seed)


class Schedule:
    """Which domain a stream position draws from, and how many of its prompts came before, in O(log) time.

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


def build_prompt_sets(tasks: Sequence[Task], tokenizer: Tokenizer, *, max_prompt_tokens: int) -> PromptSets:
    """Prompt sets of `data.tasks`, checked.

    ValueError names file, line, value and fix for a missing file, bad JSON, a missing answer, no prompts, a
    prompt that is too long, or characters that the tokenizer lacks.
    """
    domains = [Domain(task, number, tokenizer, max_prompt_tokens) for number, task in enumerate(tasks)]
    return PromptSets(domains)
