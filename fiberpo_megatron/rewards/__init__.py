"""Verifiers: which responses are right, and the reward they earn."""

from fiberpo_megatron.rewards.retry import RetryEnvironment
from fiberpo_megatron.rewards.reward import RandomReward, Reward, Score, TaskReward, build_reward, score

__all__ = ["RandomReward", "RetryEnvironment", "Reward", "Score", "TaskReward", "build_reward", "score"]
