"""The metrics: hand-worked values, and the same numbers on every rank however tokens are cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.fibration import PRESET_LEVELS, build_objective, histogram
from tests.fibration.oracle import random_case
from tests.fibration.ranks import run_ranks
from tests.fibration.registered import NAMES, tight
from tests.fibration.test_layout import counts_of, cut

REGIMES = ("both_pass", "one_rollback", "one_zeroed", "both_rollback", "both_zeroed")


def by_hand() -> dict[str, float]:
    """The worked example of docs/fibration.md beside a second trajectory that has not moved."""
    objective = build_objective("fiberpo", epsilon=0.1, budgets={"trajectory": (0.2, 0.04)})
    out = objective(
        torch.tensor([0.3, -0.1, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64),
        keys={"trajectory": torch.tensor([0, 0, 1, 1])},
    )
    assert out.metrics is not None
    return out.metrics.as_dict()


def test_gate_metrics_by_hand() -> None:
    found = by_hand()
    expected = {
        "gate/trajectory/nodes": 2.0,
        "gate/trajectory/plus/pass": 1.0,
        "gate/trajectory/plus/rollback": 0.0,
        "gate/trajectory/plus/zeroed": 0.0,
        "gate/trajectory/minus/pass": 0.5,
        "gate/trajectory/minus/rollback": 0.5,
        "gate/trajectory/minus/zeroed": 0.0,
        "gate/trajectory/s_plus/mean": 0.075,
        "gate/trajectory/s_plus/p99": 0.15,
        "gate/trajectory/s_minus/mean": 0.025,
        "gate/trajectory/s_minus/p99": 0.05,
        "gate/trajectory/base_weight/mean": 0.5 * (1 + math.exp(0.13)),
        "gate/trajectory/base_weight/p99": math.exp(0.13),
        "gate/trajectory/regime/both_pass": 0.5,
        "gate/trajectory/regime/one_rollback": 0.5,
        "gate/trajectory/regime/one_zeroed": 0.0,
        "gate/trajectory/regime/both_rollback": 0.0,
        "gate/trajectory/regime/both_zeroed": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-14)


def test_token_metrics_by_hand() -> None:
    found = by_hand()
    ratios = [math.exp(0.3), math.exp(-0.1), 1.0, 1.0]
    square = sum(ratio * ratio for ratio in ratios)
    expected = {
        "ratio/mean": sum(ratios) / 4,
        "effective_sample_size": sum(ratios) ** 2 / (4 * square),
        "token/count": 4.0,
        "token/weight": 1.0,
        "token/clip_share": 0.25,
        "token/trajectories_none_clipped": 0.5,
        "token/trajectories_some_clipped": 0.5,
        "token/trajectories_all_clipped": 0.0,
        "objective/value": 0.25 * (math.exp(0.28) - math.exp(-0.02)),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-14)
    assert math.log(found["ratio/max"]) == pytest.approx(0.3, rel=2**-15)  # quantised, on one rank as on several
    assert found["ratio/p99"] <= found["ratio/max"]


def test_zeroed_regimes() -> None:
    """Budgets far below the drift zero both channels of the trajectory that moves both ways."""
    with pytest.warns(UserWarning):
        objective = build_objective("fiberpo", budgets={"trajectory": (1e-4, 1e-4)})
    x = torch.tensor([0.3, -0.3, 0.3, 0.0], dtype=torch.float64)
    out = objective(x, x, torch.full_like(x, 0.25), keys={"trajectory": torch.tensor([0, 0, 1, 2])})
    found = out.metrics.as_dict()
    shares = [found[f"gate/trajectory/regime/{regime}"] for regime in REGIMES]
    assert shares == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])


def test_a_zeroed_channel_beside_one_in_rollback_is_both_beyond() -> None:
    """G-III,r of figure 2 of arXiv:2603.08239; two tokens roll back up to 1.5 times the budget."""
    objective = build_objective("fiberpo", budgets={"trajectory": (0.1, 0.08)})
    x = torch.tensor([0.25, -0.5, 0.25, -0.02, 0.02, -0.5], dtype=torch.float64)
    out = objective(x, x, torch.full_like(x, 1 / 6), keys={"trajectory": torch.tensor([0, 0, 1, 1, 2, 2])})
    found = out.metrics.as_dict()
    shares = {regime: found[f"gate/trajectory/regime/{regime}"] for regime in REGIMES}
    assert shares["both_rollback"] == shares["one_rollback"] == shares["one_zeroed"] == pytest.approx(1 / 3)
    # claim 3.5: a mean log ratio of -e bounds the mean total variation by sqrt(e / 2)
    bounds = [math.sqrt(0.125 / 2), math.sqrt(0.115 / 2), math.sqrt(0.24 / 2)]
    assert found["gate/trajectory/total_variation/mean"] == pytest.approx(sum(bounds) / 3)
    assert found["gate/trajectory/total_variation/p99"] == pytest.approx(max(bounds))


def test_clip_shares_of_ppo() -> None:
    x = torch.log(torch.tensor([1.5, 1.1, 0.5, 0.5], dtype=torch.float64))
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    ids = {"trajectory": torch.tensor([0, 1, 2, 1])}
    out = build_objective("ppo")(x, advantages, torch.full_like(x, 0.25), keys=ids)
    assert out.metrics.token.clip_share == 0.5
    assert out.metrics.token.trajectories_none_clipped == pytest.approx(1 / 3)
    assert out.metrics.token.trajectories_all_clipped == pytest.approx(2 / 3)
    no_ids = build_objective("ppo")(x, advantages, torch.full_like(x, 0.25))
    assert "token/trajectories_none_clipped" not in no_ids.metrics.as_dict()


@pytest.mark.parametrize("membership", ["soft", "hard"])
def test_expert_metrics(membership: str) -> None:
    case = random_case(1)
    out = case.call(build_objective("fiberpo-expert", expert_membership=membership))
    share = case.share
    if membership == "hard":
        share = torch.nn.functional.one_hot(share.argmax(1), 3).double()
    mass = case.weights @ share
    drift = (case.weights * case.x.abs()) @ share / mass
    entropy = -(case.weights @ torch.special.xlogy(case.share, case.share).sum(1))
    found = out.metrics.as_dict()
    assert [found[f"expert/mass/p{p}"] for p in range(3)] == pytest.approx(mass.tolist())
    assert [found[f"expert/drift/p{p}"] for p in range(3)] == pytest.approx(drift.tolist())
    assert found["expert/entropy"] == pytest.approx(float(entropy))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_global(name: str) -> None:
    case = random_case(7, trajectories=12)
    alone = case.call(tight(name)).metrics.as_dict()
    parts = cut(case, 3, 1, trajectories_whole=False)
    outputs, _ = run_ranks(tight(name), case, parts, counts=counts_of(case))
    for out in outputs:
        found = out.metrics.as_dict()
        assert found.keys() == alone.keys()
        # the maximum (which caps p99) is known to 2**-16 of its logarithm; the rest differs by summation order
        for name_of in ("ratio/max", "ratio/p99"):
            assert found.pop(name_of) == pytest.approx(alone[name_of], rel=1e-4)
        assert found == pytest.approx({key: alone[key] for key in found}, rel=1e-9)


@pytest.mark.parametrize("name", list(PRESET_LEVELS))
def test_regimes_and_channels_add_up(name: str) -> None:
    with pytest.warns(UserWarning):
        objective = tight(name)
    for seed in range(3):
        found = random_case(seed).call(objective).metrics.as_dict()
        for level in objective.level_names:
            assert sum(found[f"gate/{level}/regime/{regime}"] for regime in REGIMES) == pytest.approx(1.0)
            for channel in ("plus", "minus"):
                shares = [found[f"gate/{level}/{channel}/{kind}"] for kind in ("pass", "rollback", "zeroed")]
                assert sum(shares) == pytest.approx(1.0)


# ---- the histogram ----


def test_quantile_is_within_a_bin() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    counts = histogram.histogram(x).double()
    assert counts.sum() == 20_000
    for share in (0.01, 0.3, 0.5, 0.9, 0.99):
        exact = float(x.quantile(share))
        assert histogram.quantile(counts, share) == pytest.approx(exact, rel=1 / 32, abs=2**-13)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=6), st.integers(1, 4))
def test_maximum_across_ranks(values: list[float], ranks: int) -> None:
    parts = [torch.tensor(values[rank::ranks], dtype=torch.float32) for rank in range(ranks)]
    counts = torch.stack([histogram.histogram(part) for part in parts]).sum(0).double()
    top = histogram.top_bin(counts)
    local = [float(part.max()) if part.numel() else float("-inf") for part in parts]
    fine = torch.stack([histogram.fine_position(value, top) for value in local]).sum(0)
    # relative 2**-16 of the log ratio, or the innermost bin of +-2**-14
    assert histogram.refined_maximum(top, fine) == pytest.approx(max(values), rel=2**-15, abs=2**-14)


def test_histogram_without_tokens() -> None:
    counts = histogram.histogram(torch.zeros(0)).double()
    assert histogram.top_bin(counts) == -1
    assert histogram.quantile(counts, 0.99) == 0.0
    assert histogram.refined_maximum(-1, torch.zeros(histogram.FINE_BINS)) == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_maximum_when_several_ranks_share_its_bin(sign: float) -> None:
    local = [sign * 0.1, sign * 0.1001, sign * 0.1002]
    counts = histogram.histogram(torch.tensor(local)).double()
    top = histogram.top_bin(counts)
    assert float(counts[top]) == 3.0
    fine = torch.stack([histogram.fine_position(value, top) for value in local]).sum(0)
    assert histogram.refined_maximum(top, fine) == pytest.approx(max(local), rel=2**-15)
