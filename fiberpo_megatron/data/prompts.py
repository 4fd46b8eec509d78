"""Tokenised prompt sets over several domains, and the training stream as a pure function of (seed, step).

Nothing here keeps state: every rank, and a resumed run, computes the same prompts from the step number.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from fiberpo_megatron.config.schema import JsonlTask
from fiberpo_megatron.data.shuffle import Permutation, derive_key
from fiberpo_megatron.data.tasks import Problem, ProblemSet, Task, build_problem_set
from fiberpo_megatron.data.tokenizer import Tokenizer
from fiberpo_megatron.types import Prompt

SCHEDULE_SLOTS = 1000
"""Length of the repeating schedule that mixes domains: weights are met to 1/1000."""

TASK_ALPHABET = {"addition": "0123456789+=", "sort": "s:0123456789="}


@dataclass(frozen=True)
class Example:
    """A prompt with its right answer, for supervised warm-up."""

    prompt: Prompt
    target_ids: tuple[int, ...]
    """Tokens of the answer, then the end-of-sequence token."""


class Domain:
    """One task's problems with their tokens."""

    def __init__(self, task: Task, number: int, tokenizer: Tokenizer, max_prompt_tokens: int) -> None:
        self.task = task
        self.number = number
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.problems: ProblemSet = build_problem_set(task)
        self.chat_template = isinstance(task, JsonlTask) and task.chat_template
        self._check()

    def _check(self) -> None:
        """Refuse at the start what would fail at some later step."""
        if isinstance(self.task, JsonlTask):
            for position in range(self.problems.train_size):
                self.train(position)
            for position in range(self.problems.held_out_size):
                self.held_out(position)
            return
        alphabet = TASK_ALPHABET[self.task.kind]
        ids = self.tokenizer.encode(alphabet, add_special_tokens=False)
        seen = self.tokenizer.decode(ids, skip_special_tokens=True)
        if seen.replace(" ", "") != alphabet:
            raise ValueError(
                f"task {self.task.name!r}: the tokenizer turns {alphabet!r} into {seen!r}; use one that "
                f"has these characters (examples/demo/model has one)"
            )
        self.train(0)

    def train(self, position: int) -> Prompt:
        return self._tokenise(self.problems.train(position))

    def held_out(self, position: int) -> Prompt:
        return self._tokenise(self.problems.held_out(position))

    def shuffled(self, position: int, *key: object) -> Prompt:
        """Training prompt at `position` of the endless stream of `key`: shuffled anew in every epoch."""
        size = self.problems.train_size
        epoch, place = divmod(position, size)
        return self.train(Permutation(size, derive_key(*key, self.task.name, epoch))(place))

    def _tokenise(self, problem: Problem) -> Prompt:
        text, templated = self._render(problem)
        # A chat template writes its own special tokens; plain text gets the tokenizer's (such as BOS).
        ids = self.tokenizer.encode(text, add_special_tokens=not templated)
        if not 1 <= len(ids) <= self.max_prompt_tokens:
            raise ValueError(
                f"{problem.source}: the prompt has {len(ids)} tokens, allowed are 1 to "
                f"data.max_prompt_tokens = {self.max_prompt_tokens}; shorten it or raise the limit: "
                f"{text[:80]!r}"
            )
        return Prompt(problem.index, self.number, tuple(ids), text, problem.answer)

    def _render(self, problem: Problem) -> tuple[str, bool]:
        """(text, whether a chat template made it)."""
        if isinstance(problem.prompt, str):
            if not self.chat_template:
                return problem.prompt, False
            messages = [{"role": "user", "content": problem.prompt}]
        else:
            messages = list(problem.prompt)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{problem.source}: the prompt needs a chat template but the tokenizer has none; set "
                f"`chat_template = false` for task {self.task.name!r} and write prompts as plain strings, or "
                f"add a chat_template to the model's tokenizer_config.json"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise ValueError(f"{problem.source}: the chat template refuses the prompt: {error}") from error
        return rendered, True


class PromptSets:
    """All domains of a run."""

    def __init__(self, domains: Sequence[Domain], tokenizer: Tokenizer) -> None:
        self._domains = tuple(domains)
        self._tokenizer = tokenizer
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
        return self._stream("train", seed, step, count)

    def examples_at(self, seed: int, step: int, count: int) -> list[Example]:
        """Like `prompts_at`, with the right answers; another order than `prompts_at` of the same seed."""
        return [self._example(prompt) for prompt in self._stream("sft", seed, step, count)]

    def held_out(self, count: int) -> list[Prompt]:
        """The same `count` held-out prompts in every run (fewer if there are fewer), domains in turn."""
        turns = [
            (position, number)
            for number, domain in enumerate(self._domains)
            for position in range(min(count, domain.problems.held_out_size))
        ]
        return [self._domains[number].held_out(position) for position, number in sorted(turns)[:count]]

    def _stream(self, name: str, seed: int, step: int, count: int) -> list[Prompt]:
        prompts = []
        for position in range(step * count, (step + 1) * count):
            number, place = self._schedule(position)
            prompts.append(self._domains[number].shuffled(place, name, seed))
        return prompts

    def _example(self, prompt: Prompt) -> Example:
        if self._tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
        answer = self._tokenizer.encode(prompt.answer, add_special_tokens=False)
        return Example(prompt, (*answer, self._tokenizer.eos_token_id))


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
    return PromptSets(domains, tokenizer)
