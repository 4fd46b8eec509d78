"""The gate of equation 4 of arXiv:2604.03044 and a whole objective worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.fibration.gates import gate
from tests.fibration.oracle import slow_gate


def gate_at(residual: float, budget: float, k: float) -> tuple[float, float]:
    value, slope = gate(*(torch.tensor([v], dtype=torch.float64) for v in (residual, budget, k)))
    return float(value), float(slope)


def test_gate_by_hand() -> None:
    # C = 0.2, k = 4: rollback from 0.2 to 0.25, g = 5 * 0.2 - 4 D in between.
    assert gate_at(0.1, 0.2, 4) == (0.1, 1.0)
    assert gate_at(0.22, 0.2, 4) == (pytest.approx(0.12, abs=1e-15), -4.0)
    assert gate_at(-0.22, 0.2, 4) == (pytest.approx(-0.12, abs=1e-15), -4.0)
    assert gate_at(0.25, 0.2, 4) == (0.0, 0.0)
    assert gate_at(3.0, 0.2, 4) == (0.0, 0.0)


positive = st.floats(1e-3, 1.0)
tokens = st.integers(1, 100_000)


@settings(deadline=None)
@given(positive, tokens)
def test_gate_is_continuous_and_vanishes(budget: float, k: int) -> None:
    step = 1e-9 * budget
    assert gate_at(budget + step, budget, k)[0] == pytest.approx(budget, abs=2 * (k + 1) * step)
    end = (1 + 1 / k) * budget
    assert gate_at(end - min(step, 0.1 * budget / k), budget, k)[0] == pytest.approx(0.0, abs=2 * (k + 1) * step)
    assert gate_at(end * (1 + 1e-12), budget, k) == (0.0, 0.0)


@settings(deadline=None)
@given(st.floats(-2, 2), positive, tokens)
def test_gate_is_odd_bounded_and_matches_the_slow_one(residual: float, budget: float, k: int) -> None:
    value, slope = gate_at(residual, budget, k)
    assert gate_at(-residual, budget, k) == (-value, slope)
    assert abs(value) <= budget * (1 + 1e-9)  # (k + 1) C - k D cancels: rounding grows with k
    assert value == pytest.approx(float(slow_gate(torch.tensor(residual, dtype=torch.float64), budget, k)), abs=1e-12)
    assert slope in (1.0, 0.0, -float(k))


@settings(max_examples=30, deadline=None)
@given(positive, st.integers(1, 50), st.floats(0.05, 0.95))
def test_rollback_slope_is_the_derivative(budget: float, k: int, where: float) -> None:
    at, step = budget * (1 + where / k), 1e-7 * budget / k
    rise = (gate_at(at + step, budget, k)[0] - gate_at(at - step, budget, k)[0]) / (2 * step)
    assert rise == pytest.approx(-k, rel=1e-4)


def test_one_trajectory_by_hand() -> None:
    """The worked example of docs/fibration.md."""
    objective = build_objective("fiberpo", epsilon=0.1, budgets={"trajectory": (0.2, 0.04)})
    out = objective(
        torch.tensor([0.3, -0.1], dtype=torch.float64),
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        keys={"trajectory": torch.tensor([0, 0])},
    )
    # S+ = 0.15 passes, S- = 0.05 is in rollback with g = 3 * 0.04 - 2 * 0.05 = 0.02; log w = 0.13.
    # Token 1: clip(0.15) - clip(-0.05) = 0.10 + 0.05; token 2: clip(-0.05) - clip(0.15) = -0.05 - 0.10.
    w_1, w_2 = 0.5 * math.exp(0.28), -0.5 * math.exp(-0.02)
    assert out.gated_ratio.tolist() == pytest.approx([math.exp(0.28), math.exp(-0.02)], abs=1e-15)
    assert float(out.value) == pytest.approx(w_1 + w_2, abs=1e-15)
    # Channel +: token 1's own and token 2's other clip are stopped, so B+ = W; channel -: B- = (-2 - 1) W.
    total = w_1 + w_2
    assert out.gradient.tolist() == pytest.approx([0.5 * total, w_2 - 1.5 * total], abs=1e-15)
    assert out.gradient.tolist() == pytest.approx([0.0857327848, -0.7472976908], abs=1e-9)


def test_the_largest_slope_by_hand() -> None:
    """Six tokens with the bound k_max = 2: rollback has the slope of two tokens, and ends at (1 + 1/2) C."""
    mu = torch.full((6,), 1 / 6, dtype=torch.float64)
    keys = {"trajectory": torch.zeros(6, dtype=torch.int64)}
    objective = build_objective("fiberpo", epsilon=0.05, budgets={"trajectory": (0.2, 0.1)}, k_max=2)
    for drift, log_weight, slope in ((0.25, 3 * 0.2 - 2 * 0.25, -2.0), (0.31, 0.0, 0.0)):
        out = objective(torch.full_like(mu, drift), torch.ones_like(mu), mu, keys=keys)
        assert out.gated_ratio.tolist() == pytest.approx([math.exp(log_weight)] * 6, abs=1e-14)
        # The residuals are 0 and free, the other clips as well, so that c = w + mu (slope - 1) W with W = G.
        assert out.gradient.tolist() == pytest.approx([slope * math.exp(log_weight) / 6] * 6, abs=1e-14)
    six = build_objective("fiberpo", epsilon=0.05, budgets={"trajectory": (0.2, 0.1)})
    assert six(torch.full_like(mu, 0.25), torch.ones_like(mu), mu, keys=keys).metrics.levels[0].plus.zeroed == 1.0


@pytest.mark.filterwarnings("ignore:epsilon")
def test_two_levels_by_hand() -> None:
    """Two one-token trajectories in one group: residuals against the group's mean."""
    objective = build_objective(
        "fiberpo",
        levels=[["trajectory"], ["prompt_group"]],
        epsilon=0.5,
        budgets={"trajectory": (0.16, 0.1), "prompt_group": (0.3, 0.2)},
    )
    out = objective(
        torch.tensor([0.4, 0.2], dtype=torch.float64),
        torch.tensor([1.0, 1.0], dtype=torch.float64),
        torch.tensor([0.75, 0.25], dtype=torch.float64),
        keys={"trajectory": torch.tensor([0, 1]), "prompt_group": torch.tensor([0, 0])},
    )
    # Group S+ = 0.35, k = 2: rollback, g = 3 * 0.3 - 2 * 0.35 = 0.2. Residuals 0.05 (pass) and
    # -0.15 (pass). Fibers are 0: a one-token trajectory is its own mean.
    assert out.gated_ratio.tolist() == pytest.approx([math.exp(0.25), math.exp(0.05)], abs=1e-14)
    w_1, w_2 = 0.75 * math.exp(0.25), 0.25 * math.exp(0.05)
    pushed = -3.0 * (w_1 + w_2)
    assert out.gradient.tolist() == pytest.approx([w_1 + 0.75 * pushed, w_2 + 0.25 * pushed], abs=1e-14)
