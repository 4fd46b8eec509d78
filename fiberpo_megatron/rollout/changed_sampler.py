"""This module samples with other settings than the run's, as an evaluation may."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from numpy.typing import ArrayLike

from fiberpo_megatron.engines.client import Sampling
from fiberpo_megatron.interfaces import Sampler, SamplingChange, Segments
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import Completion


def changed(sampling: Sampling, change: SamplingChange | None) -> Sampling:
    """Return the run's sampling with what an evaluation changes."""
    if change is None:
        return sampling
    wanted = {name: value for name, value in vars(change).items() if value is not None}
    if wanted.get("temperature") == 0:  # SGLang's own way to say greedy; its kernels do not divide by 0
        wanted |= {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    return replace(sampling, **wanted)


@dataclass(frozen=True)
class ChangedSampler:
    """It implements `interfaces.Sampler` for an evaluation that samples differently from the run."""

    sampler: Sampler
    change: SamplingChange

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
        priority: int = 0,
        track: Track | None = None,
        known_routes: int = 0,
        segments: Segments | None = None,
    ) -> list[Completion]:
        """Return responses that are sampled with the change of this sampler; `change` must be None."""
        assert change is None, "a changed sampler is not changed again"
        return await self.sampler.sample(
            prompt,
            seeds,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            change=self.change,
            priority=priority,
            track=track,
            known_routes=known_routes,
            segments=segments,
        )

    def score(self, token_ids: Sequence[int]) -> Mapping[int, ArrayLike]:
        """Return what the engines say about tokens, which no change affects."""
        return self.sampler.score(token_ids)
