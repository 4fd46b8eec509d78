"""The causes of drift, on batches of known differences."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fiberpo_megatron.trainer.drift import optimiser_drift, sampling_drift
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.types import TokenScores
from tests.trainer.test_loop import training
from tests.trainer.toy import SingleLayout


class Part:
    """What the metrics read of a mini-batch: four tokens, of which the last two are one and three versions old."""

    rollout_log_probs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    keys = {"version": torch.tensor([2, 3, 1, 0]), "engine": torch.tensor([0, 1, 1, 1])}
    labels = {"version": torch.tensor([3, 1, 0, -1]), "engine": torch.tensor([-1, 4])}


def test_each_cause_has_its_tokens():
    scores = TokenScores(torch.tensor([-1.5, -2.25, -2.0, -1.0]), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    steps = [
        ([scores.log_probs], scores.log_probs),
        ([torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])], scores.log_probs),
    ]
    layout: Any = SingleLayout()
    part: Any = Part()
    drift = sampling_drift(layout, [part], [scores])
    assert drift is not None and drift.metrics() == {
        "entropy": 1.5, "rollout_diff/mean": 4.75 / 4, "rollout_diff/max": 3.0,
        "drift/mismatch": (0.5 + 0.25) / 2, "drift/staleness": (1.0 + 3.0) / 2,
        "drift/lag/unknown": 0.25, "drift/lag/0": 0.5, "drift/lag/1": 1.0, "drift/lag/3": 3.0,
        "drift/engine/unknown": 0.5,
    }  # fmt: skip
    assert drift.mismatch() == {}, "engine 4 has no token of the trainer's weights"
    assert optimiser_drift(layout, steps) == {"drift/optimiser_steps": 0.75 / 8}
    assert sampling_drift(layout, [part], [None]) is None
    assert optimiser_drift(layout, [([], torch.zeros(0))]) == optimiser_drift(layout, []) == {}


def test_mini_batches_with_other_engines_and_lags_are_joined():
    """Ids are dense in each mini-batch; the labels say what they are."""

    class Other(Part):
        keys = {"version": torch.tensor([0, 0, 1, 1]), "engine": torch.tensor([0, 1, 0, 1])}
        labels = {"version": torch.tensor([2, 0]), "engine": torch.tensor([4, 7])}

    scores = TokenScores(torch.tensor([-1.5, -2.25, -2.0, -1.0]), torch.zeros(4))
    layout, parts = SingleLayout(), [Part(), Other()]
    drift = sampling_drift(cast(Any, layout), cast(Any, parts), [scores, scores])
    assert drift is not None and drift.cells == {
        (-1, 0): (0.5, 1), (4, -1): (0.25, 1), (4, 1): (1.0, 1), (4, 3): (3.0, 1),
        (4, 2): (0.5, 1), (7, 2): (0.25, 1), (4, 0): (1.0, 1), (7, 0): (3.0, 1),
    }  # fmt: skip
    assert drift.mismatch() == {4: (1.0, 1), 7: (3.0, 1)}


def test_a_run_in_step_has_no_staleness():
    run, memory = training(trainer={"steps": 2}, evaluation={"prompts": 0})
    train(replace(run))
    assert memory.values("train", "drift/mismatch") == pytest.approx(memory.values("train", "rollout_diff/mean"))
    assert all(value > 0 for value in memory.values("train", "drift/optimiser_steps"))
    assert not any("drift/staleness" in metrics for _, _, metrics in memory.records)
