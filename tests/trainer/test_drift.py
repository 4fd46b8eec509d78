"""The causes of drift, on batches of known differences."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fiberpo_megatron.trainer.drift import drift_metrics
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.types import TokenScores
from tests.trainer.test_loop import training
from tests.trainer.toy import SingleLayout


class Part:
    """What the metrics read of a mini-batch: four tokens, of which the last two are one and three versions old."""

    rollout_log_probs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    keys = {"weight_version": torch.tensor([2, 3, 1, 0])}
    labels = {"weight_version": torch.tensor([3, 1, 0, -1])}


def test_each_cause_has_its_tokens():
    scores = TokenScores(torch.tensor([-1.5, -2.25, -2.0, -1.0]), torch.zeros(4))
    steps = [
        ([scores.log_probs], scores.log_probs),
        ([torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])], scores.log_probs),
    ]
    layout: Any = SingleLayout()
    part: Any = Part()
    assert drift_metrics(layout, [part], [scores], steps) == {
        "drift/mismatch": (0.5 + 0.25) / 2, "drift/staleness": (1.0 + 3.0) / 2, "drift/optimiser_steps": 0.75 / 8
    }  # fmt: skip
    assert drift_metrics(layout, [part], [None], []) == {}


def test_a_run_in_step_has_no_staleness():
    run, memory = training(trainer={"steps": 2}, evaluation={"prompts": 0})
    train(replace(run))
    assert memory.values("train", "drift/mismatch") == pytest.approx(memory.values("train", "rollout_diff/mean"))
    assert all(value > 0 for value in memory.values("train", "drift/optimiser_steps"))
    assert not any("drift/staleness" in metrics for _, _, metrics in memory.records)
