"""Every objective without a hierarchy against its paper's formula, and the options each one reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from fiberpo_megatron.fibration import build_objective
from tests.fibration.oracle import random_case, slow_apc, slow_gspo, slow_ppo
from tests.fibration.registered import NAMES, tight


def close(out, expected) -> None:
    ratio, gradient, value = expected
    torch.testing.assert_close(out.gated_ratio, ratio, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.gradient, gradient, rtol=1e-11, atol=1e-14)
    assert float(out.value) == pytest.approx(float(value), abs=1e-13)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "options", "epsilon"),
    [
        ("ppo", {}, (0.2, 0.2)),
        ("grpo", {"epsilon": 0.1}, (0.1, 0.1)),
        ("dapo", {}, (0.28, 0.2)),
        ("dapo", {"epsilon": 0.1, "epsilon_high": 0.3}, (0.3, 0.1)),
        ("ppo", {"epsilon": (0.3, 0.1)}, (0.3, 0.1)),
    ],
)
def test_token_clips(name: str, options: dict, epsilon: tuple[float, float], seed: int) -> None:
    case = random_case(seed)
    close(case.call(build_objective(name, **options)), slow_ppo(case, epsilon))


def test_dual_clip_of_the_token_clips() -> None:
    case = random_case(0, scale=1.0)
    close(case.call(build_objective("grpo", dual_clip=1.5)), slow_ppo(case, (0.2, 0.2), 1.5))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epsilon", [(4e-4, 3e-4), (0.1, 0.05)])
def test_gspo(seed: int, epsilon: tuple[float, float]) -> None:
    case = random_case(seed, scale=0.2)
    close(case.call(build_objective("gspo", epsilon=epsilon)), slow_gspo(case, epsilon))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("delta", [0.05, 0.2, 2.0])
@pytest.mark.parametrize(("name", "key"), [("apc", "state"), ("apc-trajectory", "trajectory")])
def test_apc(seed: int, delta: float, name: str, key: str) -> None:
    case = random_case(seed)
    case.weights[::5] = 0.0  # no samples of their state
    out = case.call(build_objective(name, budgets={key: (0.6 * delta, 0.4 * delta)}))
    ratio, gradient, value = slow_apc(case, delta, key)
    nothing = case.weights == 0  # a token that is not in the sum has no gated ratio
    out.gated_ratio[nothing] = ratio[nothing]
    close(out, (ratio, gradient, value))


def test_a_state_is_no_level() -> None:
    with pytest.raises(ValueError, match="level 'state' has the key 'state'.*only 'apc' reads it"):
        build_objective("fiberpo", levels=[["state"]], budgets={"state": (0.1, 0.08)})


@pytest.mark.parametrize("counts", [None, {"state": 4}])
@pytest.mark.parametrize(("bad", "seen"), [(-2, "is -2, outside 0..3"), (4, "is 4, outside 0..3")])
def test_apc_refuses_ids_out_of_range(counts, bad: int, seen: str) -> None:
    if counts is None and bad == 4:
        pytest.skip("without counts the largest id decides")
    x = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=seen + ".*or -1 for a token alone"):
        build_objective("apc")(x, x, x, keys={"state": torch.tensor([3, -1, bad])}, counts=counts)


def test_lone_states_take_no_room_in_the_reductions() -> None:
    sizes: list[int] = []
    x = torch.full((1000,), 0.5, dtype=torch.float64)
    state = torch.full((1000,), -1)
    state[:6] = torch.tensor([0, 1, 2, 0, 1, 2])
    objective = build_objective("apc", budgets={"state": (0.1, 0.1)})
    out = objective(
        x,
        x,
        x / 500,
        keys={"state": state},
        counts={"state": 3},
        reduce=lambda table: sizes.append(table.numel()),
        metrics=False,
    )
    limbs = [sum(it.limbs for it in ranges) for ranges in (objective.term_ranges, objective.adjoint_ranges)]
    assert sizes == [count * (3 + 1) + 1 for count in limbs]  # and whether a sum is beyond its range
    assert torch.allclose(out.gated_ratio[6:], torch.tensor(1.2, dtype=torch.float64)), (
        "the bound of one sample is delta"
    )
    assert not out.gradient[6:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gspo_and_cispo_are_the_papers_far_from_the_old_policy(dtype: torch.dtype) -> None:
    """Up to |x| = 80, where exp(x) squared overflows float32; beyond, the token is at the clamp."""
    case = random_case(2, scale=0.2)
    case.x[::3] = torch.linspace(-80, 80, case.x[::3].shape[0], dtype=torch.float64)
    exact = slow_gspo(case, (4e-4, 3e-4))
    ratio = case.x.exp().clamp(0.0, 5.0)
    case.x, case.advantages, case.weights = (t.to(dtype) for t in (case.x, case.advantages, case.weights))
    found = case.call(build_objective("gspo"))
    # the error of x in float32, times 80
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-4, "atol": 1e-12 if dtype == torch.float64 else 1e-6}
    torch.testing.assert_close(found.gated_ratio.double(), exact[0], **tolerance)
    torch.testing.assert_close(found.gradient.double(), exact[1], **tolerance)
    clipped = case.call(build_objective("cispo"))
    torch.testing.assert_close(clipped.gated_ratio.double(), ratio, **tolerance)
    torch.testing.assert_close(clipped.gradient, case.weights * case.advantages * clipped.gated_ratio)
    assert clipped.gradient[::3].ne(0).any()
    assert math.log(clipped.metrics.ratio.max) == pytest.approx(80, rel=2**-15)
    for out in (found, clipped):
        assert all(math.isfinite(value) for value in out.metrics.as_dict().values()), out.metrics
    case.x[0] = 90.0
    assert case.call(build_objective("cispo")).gradient[0] == 0


def test_cispo_and_reinforce_by_hand() -> None:
    x = torch.tensor([0.0, math.log(3.0), -math.log(4.0)], dtype=torch.float64)
    advantages = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    plain = build_objective("reinforce")(x, advantages, weights)
    assert plain.gradient.tolist() == pytest.approx([1.0, 0.75, -0.0625])
    clipped = build_objective("cispo", epsilon=(1.0, 0.5))(x, advantages, weights)
    assert clipped.gated_ratio.tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert clipped.gradient.tolist() == pytest.approx([1.0, 0.5, -0.125])  # clipped tokens keep a gradient


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_objective_is_the_policy_gradient(name: str) -> None:
    """First-order agreement at x = 0. GSPO spreads a trajectory's weight evenly, so mu is even too."""
    case = random_case(3)
    case.x = torch.zeros_like(case.x)
    lengths = case.ids["trajectory"].bincount()
    case.weights = (1.0 / (lengths.shape[0] * lengths.double()))[case.ids["trajectory"]]
    case.advantages = torch.randn(lengths.shape[0], dtype=torch.float64)[case.ids["trajectory"]]
    out = case.call(build_objective(name))
    torch.testing.assert_close(out.gradient, case.weights * case.advantages, rtol=1e-14, atol=0)
    assert torch.equal(out.gated_ratio, torch.ones_like(case.x))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("widths", "scale"), [("default", 0.02), ("tight", 0.3)])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_finite_difference_where_the_objective_says_so(
    name: str, widths: str, scale: float
) -> None:
    case = random_case(5, scale=scale)
    case.x[case.x == 0] = 0.01  # the channels have a kink at zero; the convention there has its own test
    case.x[3] = 1.9  # a ratio of 6.7: beyond CISPO's bound, inside of which its gradient is the derivative
    objective = tight(name) if widths == "tight" else build_objective(name)
    gradient = case.call(objective).gradient
    step, at, slopes = 1e-6, case.x.clone(), torch.empty_like(gradient)
    for i in range(at.shape[0]):
        values = []
        for sign in (1, -1):
            case.x = at.clone()
            case.x[i] += sign * step
            values.append(float(case.call(objective, metrics=False).value))
        slopes[i] = (values[0] - values[1]) / (2 * step)
    # central differences of a function of curvature O(k^2): 1e-7 absolute is what a step of 1e-6 resolves
    assert torch.allclose(slopes, gradient, rtol=1e-6, atol=1e-7) is objective.gradient_is_derivative


# ---- APC-Obj against the constrained problem it censors ----


def constrained_optimum(advantages: np.ndarray, budget: float) -> tuple[float, np.ndarray]:
    """max sum A_i r_i subject to sum |r_i - 1| <= budget and r >= 0, as a linear programme: r = 1 + p - n."""
    size = advantages.shape[0]
    cost = np.concatenate([-advantages, advantages])
    bounds = [(0, None)] * size + [(0, 1)] * size
    solution = linprog(cost, A_ub=np.ones((1, 2 * size)), b_ub=[budget], bounds=bounds)
    return float(advantages.sum() - solution.fun), 1 + solution.x[:size] - solution.x[size:]


def apc_value(ratio: np.ndarray, advantages: np.ndarray, states: np.ndarray, delta: float) -> float:
    size = ratio.shape[0]
    objective = build_objective("apc", budgets={"state": (0.5 * delta, 0.5 * delta)})
    out = objective(
        torch.from_numpy(np.log(np.maximum(ratio, 1e-8))),
        torch.from_numpy(advantages),
        torch.ones(size, dtype=torch.float64),
        keys={"state": torch.from_numpy(states)},
    )
    return float(out.value)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.floats(0.01, 0.6),
    st.floats(0.01, 2.0),
)
def test_apc_never_exceeds_the_trust_region_optimum_of_every_state_and_reaches_it(
    seed: int, samples: list[int], delta: float, spread: float
) -> None:
    """Theorem 3.3 of arXiv:2603.08239: with free ratios, the maximiser is the sample-based TV-TRPO update, which is one
    linear programme per state. Samples of a state that drew the same action count as often as they occur."""
    draw = np.random.default_rng(seed)
    states = np.repeat(np.arange(len(samples)), samples)
    advantages = draw.normal(size=states.size)
    best = np.empty(states.size)
    optimum = 0.0
    for state, size in enumerate(samples):
        found, best[states == state] = constrained_optimum(advantages[states == state], size * delta)
        optimum += found
    known = np.where(np.repeat(samples, samples) == 1, -1, states)  # a state that was sampled once
    known[known >= 0] = np.unique(known[known >= 0], return_inverse=True)[1]
    for _ in range(5):
        ratio = np.exp(draw.normal(size=states.size) * spread)
        assert apc_value(ratio, advantages, known, delta) <= optimum + 1e-9
        towards = best + draw.normal(size=states.size) * 0.05  # also close to the optimum
        assert apc_value(np.maximum(towards, 1e-6), advantages, known, delta) <= optimum + 1e-6
    # shrunk by 1e-9 so that rounding of the log ratio stays inside the constraint
    assert apc_value(1 + (best - 1) * (1 - 1e-9), advantages, known, delta) == pytest.approx(optimum, abs=1e-6)


def test_equal_actions_of_a_state_are_bounded_as_often_as_they_were_drawn() -> None:
    """The programme over distinct actions with multiplicities has the same optimum as the one over samples."""
    advantages, times = np.array([1.0, -0.5, 0.25]), np.array([3, 1, 2])
    delta = 0.1
    size = times.sum()
    cost = np.concatenate([-advantages * times, advantages * times])
    bounds = [(0, None)] * 3 + [(0, 1)] * 3
    solution = linprog(cost, A_ub=np.concatenate([times, times])[None], b_ub=[size * delta], bounds=bounds)
    ratio = np.repeat(1 + solution.x[:3] - solution.x[3:], times)
    found = apc_value(1 + (ratio - 1) * (1 - 1e-9), np.repeat(advantages, times), np.zeros(size, dtype=np.int64), delta)
    assert found == pytest.approx(float((advantages * times).sum() - solution.fun), abs=1e-6)


# ---- names, options and defaults ----


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_defaults_work_without_a_warning(name: str) -> None:
    objective = build_objective(name)
    assert objective.name == name
    out = random_case(0).call(objective)
    assert torch.isfinite(out.gradient).all()


@pytest.mark.parametrize(
    ("name", "spans", "experts", "levels"),
    [
        ("fiberpo", False, False, ("trajectory",)),
        ("fiberpo-domain", True, False, ("trajectory", "prompt_group", "domain")),
        ("fiberpo-expert", True, True, ("trajectory+expert", "trajectory", "prompt_group", "domain")),
        (
            "fiberpo-expert-global",
            True,
            True,
            ("trajectory+expert", "prompt_group+expert", "domain+expert", "expert"),
        ),
        ("apc", True, False, ()),
        *((name, False, False, ()) for name in ("ppo", "grpo", "dapo", "gspo", "cispo", "apc-trajectory", "reinforce")),
    ],
)
def test_attributes(name: str, spans: bool, experts: bool, levels: tuple[str, ...]) -> None:
    objective = build_objective(name)
    assert objective.spans_micro_batches is spans
    assert objective.uses_experts is experts
    assert objective.level_names == levels


def test_experts_inside_a_trajectory_do_not_span_micro_batches() -> None:
    objective = build_objective("fiberpo", levels=[["trajectory", "expert"], ["trajectory"]])
    assert objective.uses_experts and not objective.spans_micro_batches


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fibrepo", {}, "unknown objective 'fibrepo'; choose one of fiberpo"),
        ("grpo", {"budgets": {}}, "does not read 'budgets'; remove it"),
        ("reinforce", {"epsilon": 0.1}, "reads no option"),
        ("gspo", {"dual_clip": 3.0}, "does not read 'dual_clip'"),
        ("ppo", {"unclip_positive": True}, "does not read 'unclip_positive'"),
        ("ppo", {"expert_membership": "soft"}, "does not read 'expert_membership'"),
        ("fiberpo", {"expert_membership": "soft"}, "add 'expert' to a level"),
        ("fiberpo-expert", {"expert_membership": "firm"}, "choose 'soft' or 'hard'"),
        ("fiberpo", {"epsilon_high": 0.1}, "does not read 'epsilon_high'"),
        ("dapo", {"epsilon": (0.1, 0.2), "epsilon_high": 0.1}, "pass one of the two"),
        ("fiberpo", {"epsilon": -0.1}, "must be positive"),
        ("fiberpo", {"epsilon": (0.1, 0.1, 0.1)}, "pass a pair"),
        ("grpo", {"epsilon": 1.5}, "1 - epsilon must stay"),
        ("fiberpo", {"levels": [["turn"]], "budgets": {}}, "level 'turn' has no budget"),
        ("fiberpo", {"budgets": {"trajectory": (0.1, 0.0)}}, "C_minus of level 'trajectory' is 0.0"),
        ("fiberpo", {"budgets": {"trajectory": (-0.1, 0.1)}}, "C_plus of level 'trajectory' is -0.1"),
        ("fiberpo", {"budgets": {"trajectory": 0.1}}, "pass a pair"),
        (
            "fiberpo",
            {"budgets": {"trajectory": (0.2, 0.1), "domain": (0.2, 0.1)}},
            "which the objective does not",
        ),
        ("fiberpo", {"levels": [["session"]]}, "level 'session' has no budget"),
        ("fiberpo", {"levels": []}, "non-empty list"),
        ("fiberpo", {"levels": ["trajectory"]}, "a level must be"),
        ("fiberpo", {"levels": [["trajectory"], ["trajectory"]]}, "occurs twice"),
        ("fiberpo", {"levels": [["trajectory", "trajectory"]]}, "names a key twice"),
        ("fiberpo", {"levels": [["trajectory"], ["expert"]]}, "'trajectory' is not nested in 'expert'"),
        ("fiberpo", {"dual_clip": 0.9}, "must be above 1"),
        ("fiberpo", {"pessimistic": True, "unclip_positive": True}, "remove `unclip_positive`"),
        ("gspo", {"pessimistic": True}, "does not read 'pessimistic'"),
        ("fiberpo", {"k_max": 0.5}, "k_max is 0.5; .* choose a number of 1 or more"),
        ("grpo", {"k_max": 4}, "does not read 'k_max'"),
        ("apc", {"budgets": {"domain": (0.1, 0.1)}}, "exactly budgets"),
    ],
)
def test_refused_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(name, **options)


def test_warnings_for_unsound_budgets() -> None:
    with pytest.warns(
        UserWarning, match=r"^budgets\['trajectory'\] = \(0.2, 0.3\): C_minus is not below C_plus; lower"
    ):
        build_objective("fiberpo", budgets={"trajectory": (0.2, 0.3)})
    with pytest.warns(
        UserWarning, match=r"^epsilon = 0.3: it is not well below delta .* of level 'trajectory' \(0.3\)"
    ):
        build_objective("fiberpo", epsilon=0.3, budgets={"trajectory": (0.2, 0.1)})
    with pytest.warns(UserWarning, match=r"^budgets\['trajectory'\] = \(0.04, 0.03\): delta .* twice epsilon = 0.05"):
        build_objective("fiberpo", budgets={"trajectory": (0.04, 0.03)})


# ---- the autograd function ----


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_surrogate_has_the_closed_form_gradient(name: str) -> None:
    case = random_case(5)
    objective = build_objective(name)
    old = -torch.rand(case.x.shape, dtype=torch.float64)
    new = (old + case.x).requires_grad_(True)
    case.x, case.old = new.detach() - old, old
    out = case.call(objective)
    value, again = objective.surrogate(new, old, case.advantages, case.weights, keys=case.ids, expert_share=case.share)
    (-2.0 * value).backward()
    assert torch.equal(new.grad, -2.0 * out.gradient)
    assert float(value) == float(out.value) and again.metrics == out.metrics


def test_surrogate_gradcheck() -> None:
    case = random_case(6)
    case.x[case.x == 0] = 0.02
    objective = build_objective("fiberpo-expert")
    old = torch.zeros_like(case.x)

    def value(log_probs: torch.Tensor) -> torch.Tensor:
        return objective.surrogate(
            log_probs, old, case.advantages, case.weights, keys=case.ids, expert_share=case.share
        )[0]

    assert torch.autograd.gradcheck(value, (case.x.requires_grad_(True),), eps=1e-7, atol=1e-6)
