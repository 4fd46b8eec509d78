"""A sampler's answers in the order of the prompts."""

from collections.abc import Sequence

from fiberpo_megatron.rollout.generate import EngineSampler
from fiberpo_megatron.types import Completion


def in_order(
    sampler: EngineSampler, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int] | None = None
) -> list[list[Completion]]:
    """`count` completions of each prompt, each prompt answered once."""
    groups = sorted(sampler.sample(prompts, count, seeds), key=lambda item: item[0])
    assert [index for index, _ in groups] == list(range(len(prompts)))
    return [group for _, group in groups]
