"""This module defines the study's tasks: prompts of digits, answers of digits, and a score between 0 and 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

PLUS, EQUALS, FIRST_DOMAIN, VOCABULARY = 10, 11, 12, 16
"""Token ids above the ten digits, and the number of ids."""


@dataclass(frozen=True)
class Problems:
    """Holds a number of problems of one task."""

    prompts: Tensor
    """Token ids [n, P], or [R, n, P] for several runs, as below."""
    answers: Tensor
    """The right digits [n, A]; what lies beyond a problem's length is 0 and does not count."""
    lengths: Tensor
    """Number of answer tokens [n], at most A."""
    domains: Tensor
    """Domain ids [n]."""

    def answer_mask(self) -> Tensor:
        """Return which answer tokens exist: bool [n, A]."""
        return torch.arange(self.answers.shape[-1]) < self.lengths.unsqueeze(-1)

    def repeated(self, times: int) -> Problems:
        """Return the problems of several runs, each `times` times in a row."""
        return Problems(*(getattr(self, field.name).repeat_interleave(times, 1) for field in fields(self)))


@dataclass(frozen=True)
class Task:
    """Describes one task."""

    name: str
    prompt_length: int
    answer_length: int
    """Number of tokens of the longest answer."""
    partial_credit: bool
    """Whether the score is the share of right digits, and not whether all are right."""
    domains: int
    draw: Callable[[Generator, int], Problems]
    """Returns that many random problems."""

    def score(self, problems: Problems, sampled: Tensor) -> Tensor:
        """Return the score [n] of sampled answers [n, A], or [R, n] of [R, n, A]."""
        mask = problems.answer_mask()
        right = ((sampled == problems.answers) & mask).sum(-1)
        if self.partial_credit:
            return right / problems.lengths
        return (right == problems.lengths).float()


def _integers(generator: Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator)


def draw_addition(generator: Generator, count: int) -> Problems:
    """Return sums of two numbers of two digits; the answer's three digits begin with the units."""
    a, b = _integers(generator, 100, count), _integers(generator, 100, count)
    total = a + b
    sign, equals = torch.full_like(a, PLUS), torch.full_like(a, EQUALS)
    prompts = torch.stack([a // 10, a % 10, sign, b // 10, b % 10, equals], 1)
    answers = torch.stack([total % 10, total // 10 % 10, total // 100], 1)
    return Problems(prompts, answers, torch.full_like(a, 3), torch.zeros_like(a))


def draw_running_sums(generator: Generator, count: int) -> Problems:
    """Return eight digits whose running sum modulo 10 is written down, four times around: 32 tokens."""
    digits = _integers(generator, 10, count, 8)
    prompts = torch.cat([digits, torch.full((count, 1), EQUALS)], 1)
    answers = digits.repeat(1, 4).cumsum(1) % 10
    lengths = torch.full((count,), 32)
    return Problems(prompts, answers, lengths, torch.zeros_like(lengths))


def draw_domains(generator: Generator, count: int) -> Problems:
    """Return problems of three domains: four digits backwards, eight running sums, sixteen alternating sums.

    The first token of the prompt names the domain. All sums are modulo 10.
    """
    digits = _integers(generator, 10, count, 8)
    domains = torch.arange(count) % 3
    prompts = torch.cat([(FIRST_DOMAIN + domains).unsqueeze(1), digits, torch.full((count, 1), EQUALS)], 1)
    signs = 1 - 2 * (torch.arange(16) % 2)
    backwards, sums, alternating = torch.zeros(3, count, 16, dtype=torch.long)
    backwards[:, :4] = digits[:, :4].flip(1)
    sums[:, :8] = digits.cumsum(1) % 10
    alternating[:] = signs * (signs * digits.repeat(1, 2)).cumsum(1) % 10  # each one is its digit less the one before
    answers = torch.stack([backwards, sums, alternating])[domains, torch.arange(count)]
    return Problems(prompts, answers, torch.tensor([4, 8, 16])[domains], domains)


TASKS = {
    task.name: task
    for task in (
        Task("short", 6, 3, False, 1, draw_addition),
        Task("long", 9, 32, True, 1, draw_running_sums),
        Task("domains", 10, 16, True, 3, draw_domains),
    )
}
"""The tasks by name."""
