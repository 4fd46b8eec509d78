"""The exactness properties of the fibred objectives, against a slow oracle and finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.fibration import PRESET_LEVELS, build_objective
from tests.fibration.oracle import Case, Spec, random_case, slow_fiber

# these cases want active gates, not sound budgets
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PRESETS = [(name, soft) for name in PRESET_LEVELS for soft in (True, False)]
COARSENING = ("trajectory", "pair", "prompt_group", "half", "domain", "all")


def preset(name: str, *, soft: bool, **options) -> Spec:
    levels = [list(level) for level in PRESET_LEVELS[name]]
    return Spec(levels, {"+".join(level): (0.12, 0.09) for level in levels}, soft=soft, **options)


def assert_matches(case: Case, spec: Spec, tolerance: float = 1e-12) -> None:
    out = case.call(spec.build(build_objective))
    ratio, gradient, value = slow_fiber(case, spec)
    torch.testing.assert_close(out.gated_ratio, ratio, rtol=0, atol=tolerance * float(ratio.abs().max()))
    torch.testing.assert_close(out.gradient, gradient, rtol=0, atol=tolerance * max(1.0, float(gradient.abs().max())))
    assert float(out.value) == pytest.approx(float(value), abs=tolerance * max(1.0, abs(float(value))))


@pytest.mark.parametrize(("name", "soft"), PRESETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_presets_match_the_oracle(name: str, soft: bool, seed: int) -> None:
    assert_matches(random_case(seed), preset(name, soft=soft, epsilon=(0.2, 0.1)))


@pytest.mark.parametrize(("dual_clip", "unclip_positive"), [(1.2, False), (None, True), (1.2, True)])
@pytest.mark.parametrize("epsilon", [(0.2, 0.2), (0.03, 0.02)])  # the small one is where lifted bounds show
@pytest.mark.parametrize("name", ["fiberpo", "fiberpo-expert"])
def test_overlays_match_the_oracle(
    name: str, epsilon: tuple[float, float], dual_clip: float | None, unclip_positive: bool
) -> None:
    spec = preset(name, soft=True, epsilon=epsilon, dual_clip=dual_clip, unclip_positive=unclip_positive)
    case = random_case(3)
    assert_matches(case, spec)
    plain = case.call(preset(name, soft=True, epsilon=epsilon).build(build_objective))
    assert not torch.equal(case.call(spec.build(build_objective)).gated_ratio, plain.gated_ratio)


@pytest.mark.parametrize("dual_clip", [None, 1.2])
@pytest.mark.parametrize("epsilon", [(0.2, 0.2), (0.03, 0.02)])
@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_the_pessimistic_minimum_matches_the_oracle(
    name: str, soft: bool, epsilon: tuple[float, float], dual_clip: float | None
) -> None:
    spec = preset(name, soft=soft, epsilon=epsilon, dual_clip=dual_clip, pessimistic=True)
    case = random_case(3)
    case.advantages[::4] = 0.0
    case.weights[::7] = 0.0
    ratio, gradient, value = slow_fiber(case, spec)
    out = case.call(spec.build(build_objective))
    counted = case.weights > 0
    torch.testing.assert_close(out.gradient, gradient, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(out.gated_ratio[counted], ratio[counted], rtol=1e-12, atol=0)
    assert float(out.value) == pytest.approx(float(value), abs=1e-13)
    plain = case.call(preset(name, soft=soft, epsilon=epsilon).build(build_objective))
    assert not torch.equal(out.gradient, plain.gradient)
    surplus = case.advantages * (out.gated_ratio - plain.gated_ratio)
    if dual_clip is None:
        assert float(surplus[counted].max()) <= 1e-14, "J is never above that of the two-sided clip"


@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_the_largest_slope_of_a_gate_matches_the_oracle(name: str, soft: bool) -> None:
    changed = False
    for seed in (0, 1, 2):
        case, spec = random_case(seed), preset(name, soft=soft, epsilon=(0.2, 0.1), k_max=1.5)
        assert_matches(case, spec)
        plain = case.call(replace(spec, k_max=None).build(build_objective))
        changed |= not torch.equal(case.call(spec.build(build_objective)).gradient, plain.gradient)
    assert changed


def test_a_bound_above_every_count_of_tokens_changes_nothing() -> None:
    case, spec = random_case(3), preset("fiberpo-expert", soft=True)
    left, right = (case.call(replace(spec, k_max=k_max).build(build_objective)) for k_max in (None, 1000))
    assert torch.equal(left.gradient, right.gradient) and left.metrics == right.metrics


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_the_pessimistic_gradient_is_the_finite_difference(dual_clip: float | None) -> None:
    spec = preset("fiberpo-domain", soft=True, epsilon=(0.03, 0.02), dual_clip=dual_clip, pessimistic=True)
    objective, case, step = spec.build(build_objective), random_case(5), 1e-6
    case.x[case.x == 0] = 0.01
    gradient, at = case.call(objective).gradient, case.x.clone()
    for i in range(at.shape[0]):
        values = []
        for sign in (1, -1):
            case.x = at.clone()
            case.x[i] += sign * step
            values.append(float(case.call(objective, metrics=False).value))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[i]), rel=1e-6, abs=1e-7)


def test_a_token_on_the_wrong_side_keeps_its_gradient_under_the_pessimistic_minimum() -> None:
    """A good token whose probability fell, and a bad one whose probability rose, far beyond the clip."""
    x = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    keys = {"trajectory": torch.tensor([0, 1])}
    mu = torch.full_like(x, 0.5)
    two_sided = build_objective("fiberpo")(x, advantages, mu, keys=keys)
    pessimistic = build_objective("fiberpo", pessimistic=True)(x, advantages, mu, keys=keys)
    bounded = build_objective("fiberpo", pessimistic=True, dual_clip=1.5)(x, advantages, mu, keys=keys)
    assert two_sided.gradient.tolist() == [0.0, 0.0]
    torch.testing.assert_close(pessimistic.gradient, mu * advantages * x.exp(), rtol=1e-15, atol=0)
    assert bounded.gradient.tolist() == [pessimistic.gradient[0].item(), 0.0], "exp(0.5) is beyond c = 1.5"
    assert bounded.gated_ratio[1] == 1.5
    assert pessimistic.metrics.token.clip_share == 0.0 and bounded.metrics.token.clip_share == 0.5


@st.composite
def nested_specs(draw: st.DrawFn) -> Spec:
    """A random nested chain of depth 1 to 6; the expert partition on a random number of fine levels."""
    depth = draw(st.integers(1, 6))
    keys = sorted(draw(st.sets(st.sampled_from(COARSENING), min_size=depth, max_size=depth)), key=COARSENING.index)
    experts = draw(st.integers(0, depth))
    levels = [[key, "expert"] if at < experts else [key] for at, key in enumerate(keys)]
    if draw(st.booleans()):
        levels = [list(reversed(level)) for level in levels]
    budget = st.floats(0.01, 0.4)
    budgets = {"+".join(level): (draw(budget), draw(budget)) for level in levels}
    epsilon = (draw(st.floats(0.01, 0.5)), draw(st.floats(0.01, 0.5)))
    return Spec(levels, budgets, epsilon, draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(nested_specs(), st.integers(0, 10_000), st.sampled_from([0.01, 0.1, 0.4]))
def test_random_hierarchies_match_the_oracle(spec: Spec, seed: int, scale: float) -> None:
    assert_matches(random_case(seed, trajectories=5, longest=4, scale=scale), spec, tolerance=1e-9)


@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_gradient_is_the_finite_difference(name: str, soft: bool) -> None:
    case = random_case(5)
    case.x[case.x == 0] = 0.01  # the channels have a kink at zero; the convention there has its own test
    objective = preset(name, soft=soft).build(build_objective)
    gradient = case.call(objective).gradient
    step, at = 1e-6, case.x.clone()
    for i in range(at.shape[0]):
        values = []
        for sign in (1, -1):
            case.x = at.clone()
            case.x[i] += sign * step
            values.append(float(case.call(objective, metrics=False).value))
        # central differences of a function of curvature O(k^2): 1e-7 absolute is what a step of 1e-6 resolves
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[i]), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_on_policy_gradient_is_the_policy_gradient(name: str, soft: bool, dtype: torch.dtype) -> None:
    """At x = 0 the Jacobian dG/dx is the identity: c = mu A, bit for bit."""
    case = random_case(7, trajectories=12)
    case.x, case.weights, case.advantages = (v.to(dtype) for v in (case.x * 0, case.weights, case.advantages))
    objective = preset(name, soft=soft).build(build_objective)
    for advantages in (case.advantages, torch.ones_like(case.advantages), torch.zeros_like(case.advantages)):
        case.advantages = advantages
        out = case.call(objective)
        assert torch.equal(out.gradient, case.weights * advantages)
        assert torch.equal(out.gated_ratio, torch.ones_like(case.x))


@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_on_policy_jacobian_is_the_identity(name: str, soft: bool) -> None:
    case = random_case(8, trajectories=4)
    case.x = torch.cat([case.x[:1] * 0, -0.0 * case.x[1:].abs()])  # minus zero is zero
    objective = preset(name, soft=soft).build(build_objective)
    for i in range(case.x.shape[0]):
        case.advantages = torch.zeros_like(case.x)
        case.advantages[i] = 1.0
        assert torch.equal(case.call(objective).gradient, case.weights * case.advantages)


@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_telescoping(name: str, soft: bool) -> None:
    """While no gate or clip is active G is the plain ratio and the gradient that of importance weighting."""
    case = random_case(9, scale=0.02)
    spec = preset(name, soft=soft, epsilon=(1.0, 1.0))
    spec.budgets = dict.fromkeys(spec.budgets, (1.0, 0.9))
    out = case.call(spec.build(build_objective))
    torch.testing.assert_close(out.gated_ratio, case.x.exp(), rtol=1e-14, atol=0)
    torch.testing.assert_close(out.gradient, case.weights * case.advantages * case.x.exp(), rtol=1e-13, atol=1e-17)


def test_block_structure() -> None:
    """fiberpo: a token's gradient does not see other trajectories (dG_i/dx_j = 0 across them)."""
    objective = preset("fiberpo", soft=True).build(build_objective)
    case = random_case(10)
    trajectory = case.ids["trajectory"]
    before = case.call(objective).gradient
    case.x = torch.where(trajectory == 2, case.x + 0.3, case.x)
    case.advantages = torch.where(trajectory == 2, -case.advantages, case.advantages)
    after = case.call(objective).gradient
    assert torch.equal(before[trajectory != 2], after[trajectory != 2])
    assert not torch.equal(before[trajectory == 2], after[trajectory == 2])


def test_domain_preset_couples_trajectories() -> None:
    """The opposite of the block structure, so that the test above can fail."""
    objective = preset("fiberpo-domain", soft=True).build(build_objective)
    case = random_case(10)
    before = case.call(objective).gradient
    case.x = torch.where(case.ids["trajectory"] == 2, case.x + 0.6, case.x)
    other = case.ids["trajectory"] != 2
    assert not torch.equal(before[other], case.call(objective).gradient[other])


@pytest.mark.parametrize("name", list(PRESET_LEVELS))
def test_log_ratios_are_clamped(name: str) -> None:
    """Beyond +-20 the value is that at the clamp and the token's gradient is zero."""
    case = random_case(11)
    case.x[0], case.x[3] = 35.0, -25.0
    spec = preset(name, soft=True, dual_clip=3.0, unclip_positive=True)
    objective = spec.build(build_objective)
    assert_matches(case, spec, tolerance=1e-9)
    out = case.call(objective)
    assert out.gradient[0] == 0 and out.gradient[3] == 0
    case.x[0], case.x[3] = 20.0, -20.0
    at_clamp = case.call(objective)
    assert torch.equal(out.gated_ratio, at_clamp.gated_ratio)
    assert torch.equal(out.gradient[4:], at_clamp.gradient[4:])


@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_zero_advantages_and_repeated_zeros(name: str, soft: bool) -> None:
    case = random_case(12)
    case.x[case.x < 0.1] = 0.0  # long stretches of exact zeros beside active gates
    spec = preset(name, soft=soft)
    assert_matches(case, spec)
    case.advantages = torch.zeros_like(case.x)
    out = case.call(spec.build(build_objective))
    assert torch.equal(out.gradient, torch.zeros_like(case.x)) and float(out.value) == 0.0


@pytest.mark.parametrize(("name", "soft"), PRESETS)
def test_tokens_without_weight_are_not_in_the_sum(name: str, soft: bool) -> None:
    """A token of weight 0 changes nothing: neither aggregates, nor k_n, nor metrics."""
    case = random_case(13)
    spec = preset(name, soft=soft)
    objective = spec.build(build_objective)
    case.weights[::3] = 0.0
    case.weights /= case.weights.sum()
    assert_matches(case, spec)
    kept = (case.weights > 0).nonzero().squeeze(1)
    with_padding, without = case.call(objective), case.call(objective, kept)
    torch.testing.assert_close(with_padding.gradient[kept], without.gradient, rtol=0, atol=1e-14)
    assert with_padding.metrics.as_dict() == pytest.approx(without.metrics.as_dict(), abs=1e-12)


def test_long_runs_and_short_runs_agree() -> None:
    """The loop over long runs and the vectorised pass over short ones are two ways to the same sums."""
    draw = torch.Generator().manual_seed(0)
    n = 2000
    case = Case(
        torch.randn(n, generator=draw, dtype=torch.float64) * 0.2,
        torch.randn(n, generator=draw, dtype=torch.float64),
        torch.full((n,), 1 / n, dtype=torch.float64),
        {
            "trajectory": torch.arange(n) // 400,
            "prompt_group": torch.arange(n) // 800,
            "domain": torch.arange(n) // 1600,
        },
        torch.softmax(torch.randn(n, 4, generator=draw, dtype=torch.float64), 1),
    )
    shuffle = torch.randperm(n, generator=draw)
    for name, soft in PRESETS:
        objective = preset(name, soft=soft).build(build_objective)
        packed, shuffled = case.call(objective), case.call(objective, shuffle)
        torch.testing.assert_close(packed.gradient[shuffle], shuffled.gradient, rtol=1e-10, atol=1e-16)
        torch.testing.assert_close(packed.gated_ratio[shuffle], shuffled.gated_ratio, rtol=1e-12, atol=0)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(14, trajectories=20)
    objective = preset("fiberpo-expert", soft=True).build(build_objective)
    whole = case.call(objective)
    monkeypatch.setattr("fiberpo_megatron.fibration.runs.CPU_CHUNK", 7)
    cut = case.call(objective)
    torch.testing.assert_close(whole.gradient, cut.gradient, rtol=1e-10, atol=1e-16)
    assert whole.metrics.as_dict() == pytest.approx(cut.metrics.as_dict(), rel=1e-10)


def test_float32_is_close_to_float64() -> None:
    case = random_case(15, trajectories=30, scale=0.1)
    objective = preset("fiberpo-expert", soft=True).build(build_objective)
    wide = case.call(objective)
    case.x, case.weights, case.advantages = case.x.float(), case.weights.float(), case.advantages.float()
    narrow = case.call(objective)
    assert narrow.gradient.dtype == narrow.gated_ratio.dtype == torch.float32
    # rounding of float32 inputs, amplified by rollback slopes of k <= 30
    torch.testing.assert_close(narrow.gradient.double(), wide.gradient, rtol=1e-4, atol=1e-6)


def test_hard_membership_takes_the_lowest_of_equal_partitions() -> None:
    case = random_case(16)
    case.share = torch.full_like(case.share, 1 / 3)
    tied = case.call(preset("fiberpo-expert", soft=False).build(build_objective))
    case.share = torch.eye(3, dtype=torch.float64)[torch.zeros(case.x.shape[0], dtype=torch.long)]
    first = case.call(preset("fiberpo-expert", soft=True).build(build_objective))
    torch.testing.assert_close(tied.gradient, first.gradient, rtol=0, atol=1e-15)
