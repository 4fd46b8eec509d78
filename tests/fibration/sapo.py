"""Define SAPO, an objective that this project does not have; docs/fibration.md shows this file as its example."""

from dataclasses import dataclass

import torch

from fiberpo_megatron.fibration import Chunk, GatedChunk, TokenObjective, register


@register("sapo")  # a short name is optional: an import path names the class as well
@dataclass(frozen=True)
class SAPO(TokenObjective):
    """Replaces the hard clip of the ratio by a sigmoid (SAPO, arXiv:2511.20347)."""

    tau_positive: float = 1.0
    """Temperature of tokens with a positive advantage; a higher one attenuates sooner."""
    tau_negative: float = 1.05
    """Temperature of all other tokens."""

    def check(self) -> None:
        """Refuse temperatures that are not positive."""
        if min(self.tau_positive, self.tau_negative) <= 0:
            raise ValueError(f"SAPO's temperatures are {self.tau_positive} and {self.tau_negative}; make both positive")

    def gate(self, chunk: Chunk) -> GatedChunk:
        """Return G = 1 + (4 / tau) (sigmoid(tau (r - 1)) - 1/2): the paper's gate, shifted to 1 on-policy."""
        tau = torch.full_like(chunk.ratio, self.tau_negative).masked_fill_(chunk.advantages > 0, self.tau_positive)
        passed = 0.5 * (1 + torch.tanh(0.5 * tau * (chunk.ratio - 1)))  # the sigmoid
        gated = 1 + 4 / tau * (passed - 0.5)
        slope = 4 * passed * (1 - passed)  # dG/dr; and dr/dx = r
        return GatedChunk(gated, chunk.weights * chunk.advantages * slope * chunk.ratio)
