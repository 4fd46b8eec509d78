"""Groups of trajectories for tests that look at rewards and right answers alone."""

from collections.abc import Sequence

import numpy as np

from fiberpo_megatron.types import Completion, RolloutGroup, Trajectory, WeightSpan
from tests.trainer.toy import one_prompt


def group(rewards: Sequence[float], correct: Sequence[bool], domain: int = 0, index: int = 0) -> RolloutGroup:
    """A group with these rewards; every response is one token."""
    prompt = one_prompt(index, domain)
    completion = Completion((1,), np.zeros(1, np.float32), "stop", (WeightSpan("0", 0, 1),))
    trajectories = [Trajectory(prompt, completion, "1", reward, right) for reward, right in zip(rewards, correct)]
    return RolloutGroup(prompt, tuple(trajectories))
