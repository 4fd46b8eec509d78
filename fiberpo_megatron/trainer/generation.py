"""This leader's share of a step's prompts, sampled by the engines and scored."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Protocol, TypeVar

from numpy.typing import ArrayLike

from fiberpo_megatron.engines.errors import SamplingStopped
from fiberpo_megatron.rewards import Reward
from fiberpo_megatron.rollout.conversation import Conversation, Dialogue, converse
from fiberpo_megatron.trainer.stop import never
from fiberpo_megatron.types import Completion, Prompt, RolloutGroup, Trajectory

Item = TypeVar("Item")


class Sampler(Protocol):
    """What the trainer needs of the rollout engines."""

    def sample(
        self, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int], stop: Callable[[], bool]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of a prompt, its `count` completions), each prompt once, as they are finished; one sampling seed per
        prompt. Raises SamplingStopped once `stop` says so."""
        ...

    def score(self, token_ids: Sequence[int]) -> Sequence[ArrayLike]:
        """Per engine: log-probs [len - 1] of token_ids[1:] at temperature 1."""
        ...


@dataclass(frozen=True)
class Generator:
    """Prompts in, scored groups out."""

    sampler: Sampler
    decode: Callable[[Sequence[int]], str]
    """Response token ids to text, stop and special tokens left out."""
    reward: Reward
    seed: int
    """Sampling depends on it, on the weights' version and on the prompt, not on which rank asks."""
    dialogue: Dialogue | None = None
    """Answers the policy's turns; None: every response is one turn."""

    def groups(
        self, prompts: Sequence[Prompt], count: int, version: str, stop: Callable[[], bool] = never
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """(index of a prompt, its `count` scored trajectories), each prompt once, as they are finished; all sampled
        with weights `version`. Fewer prompts where `stop` says so before the last has ended.

        Raises RuntimeError when an engine answered with other weights: the loop is synchronous, so that would
        mean that a publication was lost.
        """
        conversations = converse(
            partial(self.sampler.sample, stop=stop),
            prompts,
            count,
            [self._seed(prompt, version) for prompt in prompts],
            decode=self.decode,
            dialogue=self.dialogue,
        )
        with suppress(SamplingStopped):
            for index, group in conversations:
                yield index, RolloutGroup(prompts[index], tuple(self._trajectory(c, version) for c in group))

    def _seed(self, prompt: Prompt, version: str) -> int:
        name = f"{self.seed} {version} {prompt.domain} {prompt.index}".encode()
        return int.from_bytes(blake2b(name, digest_size=4).digest(), "big") >> 1  # engines take 31 bits

    def _trajectory(self, conversation: Conversation, version: str) -> Trajectory:
        prompt = conversation.prompt
        for turn in conversation.turns:
            seen = {span.version for span in turn.weight_spans}
            if seen - {version}:
                raise RuntimeError(
                    f"a rollout of prompt {prompt.text!r} was sampled with weights {sorted(seen)}, but {version!r} was "
                    "published last; check that nobody else publishes to these engines"
                )
            if not turn.token_ids:
                raise RuntimeError(
                    f"the engine returned an empty response to prompt {prompt.text!r} "
                    f"(finish reason {turn.finish_reason!r}); raise rollout.max_response_tokens"
                )
        score = self.reward.score(prompt, conversation.texts[-1], conversation.sample)
        return Trajectory(prompt, conversation.completion, conversation.text, score.reward, score.correct)


def share(items: Sequence[Item], data_rank: int, data_size: int) -> Sequence[Item]:
    """The contiguous share of a data-parallel rank: joined in rank order the shares are the step's prompts again,
    so the batch does not depend on the layout."""
    return items[len(items) * data_rank // data_size : len(items) * (data_rank + 1) // data_size]
