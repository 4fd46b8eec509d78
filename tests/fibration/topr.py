"""Define TOPR, an objective that this project does not have; docs/fibration.md shows this file as its example."""

from dataclasses import dataclass

import torch

from fiberpo_megatron.fibration import Chunk, GatedChunk, TokenObjective, register


@register("topr")  # a short name is optional: an import path names the class as well
@dataclass(frozen=True)
class TOPR(TokenObjective):
    """Takes good tokens as they are, and bounds the ratio of bad ones (TOPR, arXiv:2503.14286, token by token)."""

    bound_positive: float = 1.0
    """Largest ratio of tokens with a positive advantage; 1 is also their smallest."""
    bound_negative: float = 1.0
    """Largest ratio of all other tokens."""

    gradient_is_derivative = False  # the ratio carries no gradient

    def check(self) -> None:
        """Refuse bounds that would change the on-policy gradient."""
        if min(self.bound_positive, self.bound_negative) < 1:
            raise ValueError(f"TOPR's bounds are {self.bound_positive} and {self.bound_negative}; make both at least 1")

    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return the bounded ratio, and mu A times it as the gradient."""
        good = chunk.ratio.clamp(1.0, self.bound_positive)
        gated = torch.where(chunk.advantages > 0, good, chunk.ratio.clamp(max=self.bound_negative))
        return GatedChunk(gated, chunk.weights * chunk.advantages * gated)
