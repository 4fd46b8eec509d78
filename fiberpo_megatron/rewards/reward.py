"""From a response to its reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

from fiberpo_megatron.data.settings import DataConfig
from fiberpo_megatron.rewards.verifiers import Task, Verifier, build_verifier, verifier_name
from fiberpo_megatron.types import Prompt


@dataclass(frozen=True)
class Score:
    """Outcome of one response."""

    reward: float
    correct: bool
    """Whether the verifier accepts the response, whatever the reward is."""


class Reward(Protocol):
    """What the trainer asks for rewards."""

    def score(self, prompt: Prompt, response: str, sample: int = 0) -> Score:
        """Score of the text of the `sample`-th response to `prompt` (end-of-sequence already stripped)."""
        ...

    def close(self) -> None:
        """End the processes of the verifiers."""
        ...


class TaskReward:
    """1 for a right response, 0 for a wrong one, by the verifier of the prompt's domain."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        names = [verifier_name(task) for task in tasks]
        self._by_name = {name: build_verifier(name) for name in dict.fromkeys(names)}
        self._verifiers = [self._by_name[name] for name in names]

    def score(self, prompt: Prompt, response: str, sample: int = 0) -> Score:
        correct = self._verifiers[prompt.domain](prompt.answer, response)
        return Score(float(correct), correct)

    def close(self) -> None:
        for verifier in self._by_name.values():
            close = getattr(verifier, "close", None)
            if close is not None:
                close()


class RandomReward:
    """Control experiment: the reward is a fair coin of (seed, prompt, sample) that ignores the response.
    `correct` stays true, so that accuracy shows what such a run really learns: nothing."""

    def __init__(self, inner: Reward, seed: int) -> None:
        self._inner = inner
        self._seed = seed

    def score(self, prompt: Prompt, response: str, sample: int = 0) -> Score:
        message = repr((self._seed, prompt.domain, prompt.index, sample)).encode()
        coin = blake2b(message, digest_size=1).digest()[0] & 1
        return Score(float(coin), self._inner.score(prompt, response, sample).correct)

    def close(self) -> None:
        self._inner.close()


def build_reward(data: DataConfig, seed: int) -> Reward:
    """Reward of a run. ValueError if a verifier's package is missing."""
    reward = TaskReward(data.tasks)
    return RandomReward(reward, seed) if data.random_reward else reward


def score(task: Task, prompt: Prompt, response: str) -> Score:
    """Score of one response to a prompt of `task`; the task's verifier is kept for the next call."""
    correct = _verifier(verifier_name(task))(prompt.answer, response)
    return Score(float(correct), correct)


@lru_cache
def _verifier(name: str) -> Verifier:
    return build_verifier(name)
