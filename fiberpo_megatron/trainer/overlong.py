"""This module takes from the reward of responses that come near the length limit (DAPO, arXiv:2503.14476, section 3.4).

It happens before advantages are estimated; metrics of rewards show what the environments gave.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.trainer.settings import OverlongConfig
from fiberpo_megatron.types import RolloutBatch


def overlong_penalty(lengths: NDArray[np.int64], limit: int, cache: int) -> NDArray[np.float32]:
    """Return [B], what is added to each reward: equation 13 of arXiv:2503.14476.

    lengths: [B] response tokens. It is 0 up to `limit - cache` tokens, falls in a straight line to -1 at `limit`, and
    stays -1 beyond.
    """
    return np.clip((limit - cache - lengths) / cache, -1.0, 0.0).astype(np.float32)


def with_overlong_penalty(
    rollouts: RolloutBatch, settings: OverlongConfig, max_response_tokens: int | None
) -> tuple[RolloutBatch, dict[str, float]]:
    """Return a batch whose rewards have the penalty, and metrics; the batch itself where the penalty is switched off.

    max_response_tokens: the limit where `settings` have none.
    """
    if settings.cache_tokens is None:
        return rollouts, {}
    limit = settings.limit_tokens or max_response_tokens
    assert limit is not None, "a run has rollout.max_response_tokens"
    trajectories = rollouts.per_trajectory()
    penalty = overlong_penalty(trajectories.response_lengths, limit, settings.cache_tokens)
    metrics = {"overlong/penalty_mean": float(penalty.mean()), "overlong/penalised_share": float((penalty < 0).mean())}
    of_sequence = np.repeat(penalty, rollouts.sequences)
    return replace(rollouts, rewards=rollouts.rewards + of_sequence), metrics
