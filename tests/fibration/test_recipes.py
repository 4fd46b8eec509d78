"""Objectives as their papers have them: GSPO-token, GMPO, SAPO, DPPO and Dr.GRPO, and the widths by name."""

from __future__ import annotations

import pytest
import torch

from fiberpo_megatron.fibration import OBJECTIVES, WEIGHTINGS, Objective, build_objective, objective_class
from fiberpo_megatron.plugins import BUILT_IN
from tests.fibration.oracle import Case, random_case, slow_dppo, slow_gmpo, slow_gspo, slow_ppo, slow_sapo
from tests.fibration.test_objectives import close


def one_advantage(seed: int, scale: float = 0.3) -> Case:
    """Tokens of a trajectory have one advantage and one weight."""
    case = random_case(seed, scale=scale)
    trajectory = case.ids["trajectory"]
    lengths = trajectory.bincount().double()
    draw = torch.Generator().manual_seed(seed)
    case.advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64)[trajectory]
    case.weights = (1 / (len(lengths) * lengths))[trajectory]
    return case


def finite_differences(objective: Objective, case: Case, step: float = 1e-6) -> torch.Tensor:
    at, slopes = case.x.clone(), torch.empty_like(case.x)
    for i in range(len(at)):
        values = []
        for sign in (1, -1):
            case.x = at.clone()
            case.x[i] += sign * step
            values.append(float(case.call(objective, metrics=False).value))
        slopes[i] = (values[0] - values[1]) / (2 * step)
    case.x = at
    return slopes


@pytest.mark.parametrize("epsilon", [{"high": 4e-4, "low": 3e-4}, {"high": 0.1, "low": 0.05}])
@pytest.mark.parametrize("seed", range(3))
def test_gspo_is_gspo_where_a_trajectory_has_one_advantage(seed: int, epsilon: dict[str, float]) -> None:
    case = one_advantage(seed, scale=0.2)
    objective = build_objective("gspo", epsilon=epsilon)
    found = case.call(objective)
    close(found, slow_gspo(case, (epsilon["high"], epsilon["low"]), token=False))
    torch.testing.assert_close(found.gradient, finite_differences(objective, case), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_gspo_gives_each_token_its_own_advantage(seed: int) -> None:
    """The paper's equation 17: the weight of a token's gradient is s A_t / |y|, whatever the others' advantages."""
    case = random_case(seed, scale=0.05)
    for i in range(len(case.x)):
        case.weights[i] = 1 / float((case.ids["trajectory"] == case.ids["trajectory"][i]).sum())
    out = case.call(build_objective("gspo", epsilon=0.5))
    for i in range(len(case.x)):
        same = case.ids["trajectory"] == case.ids["trajectory"][i]
        expected = torch.exp(case.x[same].mean()) * case.advantages[i] / same.sum()
        torch.testing.assert_close(out.gradient[i], expected, rtol=1e-12, atol=0)
    assert case.call(build_objective("gspo", epsilon=1e-4)).gradient.eq(0).any(), "some tokens are held by the clip"


@pytest.mark.parametrize("seed", range(4))
def test_gmpo(seed: int) -> None:
    case = one_advantage(seed)
    case.x[2] = 0.9  # beyond the clip
    for epsilon in (0.4, {"low": 0.1, "high": 0.3}):
        widths = (0.4, 0.4) if epsilon == 0.4 else (0.3, 0.1)
        objective = build_objective("gmpo", epsilon=epsilon)
        found = case.call(objective)
        close(found, slow_gmpo(case, widths))
        torch.testing.assert_close(found.gradient, finite_differences(objective, case), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_sapo(seed: int) -> None:
    case = random_case(seed, scale=1.0)
    close(case.call(build_objective("sapo")), slow_sapo(case, 1.0, 1.05))
    objective = build_objective("sapo", tau_positive=3.0, tau_negative=5.0)
    found = case.call(objective)
    close(found, slow_sapo(case, 3.0, 5.0))
    torch.testing.assert_close(found.gradient, finite_differences(objective, case), rtol=1e-6, atol=1e-9)
    assert found.gradient.abs().max() < case.call(build_objective("reinforce")).gradient.abs().max()


@pytest.mark.parametrize("seed", range(4))
def test_dppo(seed: int) -> None:
    case = random_case(seed, scale=0.6)
    objective = build_objective("dppo", epsilon={"low": 0.05, "high": 0.08})
    found = case.call(objective)
    close(found, slow_dppo(case, (0.08, 0.05)))
    torch.testing.assert_close(found.gradient, finite_differences(objective, case), rtol=1e-6, atol=1e-9)
    assert 0 < found.metrics.token.clip_share < 1


def test_dppo_needs_old_log_probs_and_may_truncate_the_ratio() -> None:
    case = random_case(0, scale=1.0)
    case.old = torch.full_like(case.x, -9.0)  # no probability moves far
    bounded = case.call(build_objective("dppo", truncation=1.5))
    torch.testing.assert_close(bounded.gated_ratio, case.x.exp().clamp(max=1.5), rtol=1e-14, atol=0)
    assert torch.equal(bounded.gradient, case.weights * case.advantages * bounded.gated_ratio)
    case.old = None
    with pytest.raises(ValueError, match="'dppo' reads probabilities: pass old_log_probs"):
        case.call(build_objective("dppo"))
    with pytest.raises(ValueError, match="truncation is 0.9; .* at least 1"):
        build_objective("dppo", truncation=0.9)
    with pytest.raises(ValueError, match="tau_negative is 0.0; choose a positive number"):
        build_objective("sapo", tau_negative=0.0)


@pytest.mark.parametrize("name", ["drgrpo", "reinforce++"])
def test_what_is_ppo_by_another_name_has_its_gate(name: str) -> None:
    close(random_case(0).call(build_objective(name)), slow_ppo(random_case(0), (0.2, 0.2)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_paper_has_exists(name: str) -> None:
    cls = objective_class(name)
    assert cls.weighting in WEIGHTINGS
    assert cls.advantage is None or cls.advantage in BUILT_IN["advantages"]
    assert cls.paper is not None or (cls.advantage is None and cls.normalise_std is None)


# ---- widths by name ----


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if hasattr(objective_class(name), "epsilon")])
def test_widths_by_name_are_the_pair_without_its_order(name: str) -> None:
    options = {"budgets": None} if name.startswith("fiberpo") else {}
    with pytest.warns(
        UserWarning, match=r"epsilon = \(0.03, 0.01\): a pair is \(high, low\).*{low = 0.01, high = 0.03}"
    ):
        pair = build_objective(name, epsilon=(0.03, 0.01), **options)
    named = build_objective(name, epsilon={"low": 0.01, "high": 0.03}, **options)
    assert named.bounds == pair.bounds == (0.03, 0.01)


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [
        ({"low": 0.2}, "write both widths, as in {low = 0.2, high = 0.28}"),
        ({"low": 0.2, "upper": 0.3}, "write both widths"),
        ({"low": 0.2, "high": 0.0}, "must be positive"),
        ({"low": 0.2, "high": "0.3"}, "pass a pair of numbers"),
        ({"low": 1.2, "high": 0.3}, "1 - epsilon must stay"),
    ],
)
def test_widths_that_are_refused(epsilon: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_objective("grpo", epsilon=epsilon)
    with pytest.raises(ValueError, match="epsilon_high is also given"):
        build_objective("grpo", epsilon={"low": 0.2, "high": 0.3}, epsilon_high=0.3)
