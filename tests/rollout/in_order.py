"""A sampler's answers in the order of the prompts."""

import asyncio
from collections.abc import Sequence

from fiberpo_megatron.rollout.conversation import response_seeds
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.types import Completion


def in_order(
    sampler: EngineSampler, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int] | None = None
) -> list[list[Completion]]:
    """Return `count` completions of each prompt, which are all asked for at once; one seed per prompt."""
    chosen = range(len(prompts)) if seeds is None else seeds

    async def all_prompts() -> list[list[Completion]]:
        asked = (sampler.sample(prompt, response_seeds(seed, count)) for prompt, seed in zip(prompts, chosen))
        return await asyncio.gather(*asked)

    return sampler.engines.run(all_prompts())
