"""Expert shares from the engine's routing, and which routing a step uses."""

from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.environments import Task
from fiberpo_megatron.trainer.settings import AlgorithmConfig
from fiberpo_megatron.trainer.step_routing import StepRouting
from fiberpo_megatron.types import Completion, Prompt, RolloutBatch, RolloutGroup, Trajectory, WeightSpan, flatten


def rollouts(returned: bool) -> RolloutBatch:
    """Two trajectories of 2 + 2 and 1 + 3 tokens; the engine's experts count up through layers and slots."""
    trajectories = []
    for prompt_length, length in ((2, 2), (1, 3)):
        rows = prompt_length + length - 1
        experts = (np.arange(rows * 4).reshape(rows, 2, 2) % 4).astype(np.int32) if returned else None
        completion = Completion(
            tuple(range(length)), np.zeros(length, np.float32), "stop", (WeightSpan("0", 0, length),), experts
        )
        prompt = Prompt(0, 0, tuple(range(prompt_length)), "", Task(""))
        trajectories.append(RolloutGroup(prompt, (Trajectory(prompt, completion, "", 0.0, False),)))
    return flatten(trajectories)


def test_flat_routes_have_none_for_the_last_token_of_a_trajectory():
    batch = rollouts(True)
    assert batch.routed_experts.shape == (6, 2, 2) and batch.held_rows.tolist() == [0, 1, 2, 4, 5, 6]
    assert rollouts(False).routing_rows.size == rollouts(False).routed_experts.size == 0


@pytest.mark.parametrize(
    ("replay", "source", "uses_experts", "returned", "mode"),
    [
        ("none", "old", False, False, "off"),
        ("none", "old", True, False, "record"),
        ("none", "rollout", True, True, "record"),  # for the agreement
        ("old", "old", False, False, "record"),
        ("rollout", "old", False, True, "replay"),
    ],
)
def test_mode_of_the_old_log_prob_pass(replay: Any, source: Any, uses_experts: bool, returned: bool, mode: str):
    algorithm = AlgorithmConfig(routing_replay=replay, expert_routing=source)
    assert StepRouting(None, algorithm, uses_experts, rollouts(returned)).mode == mode  # type: ignore[arg-type]


class FakeRouting:
    num_experts = 4

    def agreement(self, micro_batches: Any, bins: torch.Tensor, count: int) -> torch.Tensor:
        """One token of unknown lag, three of the first known one; two layers."""
        assert bins.tolist() == [0, 1, 1, 0, 1, 1, 1, 0] and count == 2
        return torch.tensor([[[0.0, 1.0], [3.0, 3.0]], [[0.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)


class FakePolicy:
    routing = FakeRouting()


def test_agreement_per_layer_and_lag_over_all_parts():
    routing = StepRouting(FakePolicy(), AlgorithmConfig(), True, rollouts(True), 2)  # type: ignore[arg-type]
    part: Any = type("Part", (), {"micro_batches": []})()
    assert routing.agreement([part, part]) == {
        "routing_agreement/layer_0": 0.75, "routing_agreement/layer_1": 0.25, "routing_agreement/mean": 0.5,
        "routing_agreement/lag/2": 4 / 6,
    }  # fmt: skip


def test_a_token_without_a_route_is_named_where_routes_are_used():
    batch = rollouts(True)
    missing = torch.tensor([5, 6])
    for algorithm in (AlgorithmConfig(routing_replay="rollout"), AlgorithmConfig(expert_routing="rollout")):
        with pytest.raises(ValueError, match=r"2 tokens have no route .* the first is token 1 of trajectory 1 \("):
            StepRouting(None, algorithm, True, batch)._check(missing)  # type: ignore[arg-type]
    StepRouting(None, AlgorithmConfig(), True, batch)._check(missing)  # type: ignore[arg-type]
