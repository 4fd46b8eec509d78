"""This module masks the tokens of trajectories that have left the policy, where their advantage is negative."""

from fiberpo_megatron.terms.off_policy import drift_sums, off_policy_factor
from fiberpo_megatron.trainer.terms.base import GateTokens, Mask, Term


class OffPolicyMask(Term):
    """Sets weights of the objective to 0 by the off-policy sequence mask of DeepSeek-V3.2 (`terms.off_policy`).

    The weights of the other tokens stay as they are: the paper divides by all tokens, and so a masked trajectory makes
    a step smaller. Gates see no masked token.
    """

    name = "off_policy_mask"

    def __init__(self, delta: float) -> None:
        self._delta = delta

    def mask(self, tokens: GateTokens) -> Mask:
        """Return factors of 0 and 1. Ranks that share trajectories add up their sums in one reduction; in a single pass
        each call has whole trajectories."""
        trajectory = tokens.keys["trajectory"]
        sums = drift_sums(tokens.rollout_log_probs, tokens.log_probs, trajectory, tokens.counts["trajectory"])
        if tokens.reduce is not None:
            sums = tokens.reduce(sums.flatten()).view_as(sums)
        factor = off_policy_factor(sums, trajectory, tokens.advantages, self._delta)
        drift = tokens.rollout_log_probs.double() - tokens.log_probs.double()
        shares = {
            "off_policy_mask/weight_share": (tokens.weights * (1.0 - factor)).sum(),
            "off_policy_mask/drift": (tokens.weights * drift).sum(),
        }
        return Mask(factor, shares)
