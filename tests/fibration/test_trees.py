"""Budgets by node and trees of levels: against the slow oracle, finite differences, chains and separate calls."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.fibration import build_objective
from tests.fibration.oracle import Case, Spec, random_case
from tests.fibration.ranks import joined, run_ranks
from tests.fibration.test_exactness import COARSENING, assert_matches
from tests.fibration.test_layout import counts_of, cut

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TIGHT, WIDE = (0.06, 0.05), (0.3, 0.25)
BY_DOMAIN = {"by": "domain", "*": TIGHT, 1: WIDE}
CHAIN = [["trajectory", "expert"], ["trajectory"], ["prompt_group"], ["domain"]]
NODE_BUDGETS = {  # by a key of the level, by one of a coarser level, and by partition
    "trajectory+expert": {"by": "expert", "*": TIGHT, 0: WIDE, 2: (0.02, 0.01)},
    "trajectory": BY_DOMAIN,
    "prompt_group": {"*": TIGHT, 0: WIDE},
    "domain": {"*": TIGHT, 1: (0.02, 0.01)},
}
SEPARATE = {"by": "domain", "*": [["trajectory"], ["prompt_group"]], 1: [["turn", "expert"], ["turn"]]}
SHARED = {  # levels that all branches share, that some do, and that one has; one chain ends inside another
    "by": "prompt_group",
    "*": [["trajectory"], ["half"], ["all"]],
    0: [["turn", "expert"], ["trajectory", "expert"], ["half"], ["all"]],
    1: [["turn"], ["trajectory"], ["half"], ["all"]],
}
BY_TURN = {"by": "turn", "*": [["trajectory"], ["domain"]], 0: [["weight_version"], ["all"]]}


def tight(levels: list | dict, budgets: dict | None = None, **options) -> Spec:
    """Gates and clips are active on `random_case`."""
    spec = Spec(levels, {}, **{"epsilon": (0.1, 0.07), **options})
    spec.budgets = dict.fromkeys(spec.level_names(), TIGHT) | (budgets or {})
    return spec


def labelled(seed: int, **options) -> Case:
    """Turns go by their place in the trajectory, versions by how far they are behind the newest."""
    case = random_case(seed, **options)
    turn, trajectory = case.ids["turn"], case.ids["trajectory"]
    first = {int(t): int(turn[trajectory == t].min()) for t in trajectory}
    owner = {int(n): int(trajectory[turn == n][0]) for n in turn}
    case.labels["turn"] = torch.tensor([n - first[owner[n]] for n in range(int(turn.max()) + 1)])
    newest = int(case.ids["weight_version"].max())
    case.labels["weight_version"] = newest - torch.arange(newest + 1)
    return case


SPECS = {
    "nodes": tight(CHAIN, NODE_BUDGETS),
    "nodes, hard": tight(CHAIN, NODE_BUDGETS, soft=False, dual_clip=1.2, unclip_positive=True),
    "nodes by number": tight([["turn"], ["trajectory"]], {"turn": {"*": TIGHT, 0: WIDE, 7: TIGHT}}),
    "nodes by lag": tight([["weight_version"]], {"weight_version": {0: WIDE, "*": TIGHT}}),
    "separate": tight(SEPARATE),
    "shared": tight(
        SHARED, {"*,1:trajectory": {"by": "half", 0: (2, 1.9), 1: WIDE, "*": TIGHT}, "half": {"*": TIGHT, 0: WIDE}}
    ),
    "shared, hard": tight(SHARED, {"0:turn+expert": {"by": "expert", "*": TIGHT, 1: WIDE}}, soft=False),
    "by turn": tight(BY_TURN, {"*:trajectory": BY_DOMAIN}, pessimistic=True),
    "shared, at most a slope": tight(SHARED, k_max=2),
}


@pytest.fixture(params=list(SPECS))
def spec(request: pytest.FixtureRequest) -> Spec:
    return SPECS[request.param]


def test_the_oracle(spec: Spec) -> None:
    plain = replace(spec, budgets=dict.fromkeys(spec.budgets, TIGHT))
    changed = plain == spec
    for seed in (1, 5):
        case = labelled(seed, trajectories=12)
        assert_matches(case, spec)
        left, right = (case.call(it.build(build_objective)).gradient for it in (spec, plain))
        changed |= not torch.equal(left, right)
    assert changed, "budgets of nodes make no difference"


def test_the_gradient_is_the_finite_difference(spec: Spec) -> None:
    case = labelled(11)
    case.x[case.x == 0] = 0.01  # the channels have a kink at zero
    objective = spec.build(build_objective)
    gradient, step, at = case.call(objective).gradient, 1e-6, case.x.clone()
    for i in range(at.shape[0]):
        values = []
        for sign in (1, -1):
            case.x = at.clone()
            case.x[i] += sign * step
            values.append(float(case.call(objective, metrics=False).value))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[i]), abs=1e-6)


def test_on_policy_the_jacobian_is_the_identity(spec: Spec) -> None:
    case = labelled(11, trajectories=5)
    case.x = torch.zeros_like(case.x)
    objective = spec.build(build_objective)
    for i in range(case.x.shape[0]):
        case.advantages = torch.zeros_like(case.x)
        case.advantages[i] = 1.0
        out = case.call(objective)
        assert torch.equal(out.gradient, case.weights * case.advantages)
        assert torch.equal(out.gated_ratio, torch.ones_like(case.x))


@pytest.mark.parametrize("whole", [True, False])
def test_any_cut_over_ranks(spec: Spec, whole: bool) -> None:
    case, objective = labelled(1, trajectories=12), spec.build(build_objective)
    alone = case.call(objective)
    parts = [*cut(case, 3, seed=3, trajectories_whole=whole), torch.zeros(0, dtype=torch.long)]
    outputs, collective = run_ranks(objective, case, parts, counts=counts_of(case))
    assert collective.calls == [2] * 4
    # only the order of float64 sums differs, as in test_layout
    torch.testing.assert_close(joined(outputs, parts, "gradient"), alone.gradient, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(joined(outputs, parts, "gated_ratio"), alone.gated_ratio, rtol=1e-10, atol=0)
    assert outputs[0].metrics == outputs[3].metrics
    assert outputs[0].metrics.as_dict() == pytest.approx(alone.metrics.as_dict(), rel=1e-4, abs=1e-12)  # ratio/max


def test_micro_batches_of_whole_trajectories() -> None:
    """A tree whose levels lie inside trajectories needs no sum over micro-batches."""
    levels = {"by": "turn", "*": [["trajectory"]], 0: [["turn", "expert"], ["trajectory"]]}
    objective = tight(levels, {"trajectory": {"*": WIDE, 2: TIGHT}}).build(build_objective)
    assert not objective.spans_micro_batches and tight(SHARED).build(build_objective).spans_micro_batches
    case = labelled(9, trajectories=9)
    parts = cut(case, 3, 2, trajectories_whole=True)
    outputs = [case.call(objective, part, metrics=False, counts=counts_of(case)) for part in parts]
    whole = case.call(objective).gradient
    torch.testing.assert_close(joined(outputs, parts, "gradient"), whole, rtol=1e-10, atol=1e-15)


def test_equal_chains_in_all_branches_have_the_bits_of_the_chain() -> None:
    case = random_case(1, trajectories=12)
    chain = tight(CHAIN, NODE_BUDGETS).build(build_objective)
    tree = tight({"by": "domain", "*": CHAIN, 1: CHAIN}, NODE_BUDGETS).build(build_objective)
    left, right = case.call(chain), case.call(tree)
    assert torch.equal(left.gradient, right.gradient) and torch.equal(left.gated_ratio, right.gated_ratio)
    assert left.metrics == right.metrics and chain.keys == tree.keys


def test_branches_that_share_no_level_are_separate_calls() -> None:
    case = random_case(1, trajectories=12)
    spec = SPECS["separate"]
    whole = case.call(spec.build(build_objective))
    for domain, label in ((0, "*"), (1, "1")):
        part = (case.ids["domain"] == domain).nonzero().squeeze(1)
        assert part.numel() > 3
        alone = tight(spec.chain_of(case, int(part[0]))).build(build_objective)
        out = case.call(alone, part)
        torch.testing.assert_close(whole.gradient[part], out.gradient, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(whole.gated_ratio[part], out.gated_ratio, rtol=1e-12, atol=0)
        found = whole.metrics.as_dict()
        for name, value in out.metrics.as_dict().items():
            if name.startswith("gate/"):
                assert found[name.replace("gate/", f"gate/{label}:", 1)] == pytest.approx(value, rel=1e-12)
            if name.startswith("expert/"):  # of the branch with experts alone
                assert found[name] == pytest.approx(value, rel=1e-12)


@st.composite
def random_specs(draw: st.DrawFn) -> Spec:
    """Chains over the same nested keys, so that they share coarse levels by chance; budgets by keys of their levels."""

    def chain() -> list[list[str]]:
        keys = sorted(draw(st.sets(st.sampled_from(COARSENING), min_size=1, max_size=3)), key=COARSENING.index)
        experts = draw(st.integers(0, len(keys)))
        return [[key, "expert"] if at < experts else [key] for at, key in enumerate(keys)]

    numbers = draw(st.sets(st.integers(0, 2), min_size=1))
    by = draw(st.sampled_from(["prompt_group", "half", "trajectory"]))
    spec = tight({"by": by, "*": chain(), **{number: chain() for number in numbers}}, soft=draw(st.booleans()))
    if not any("expert" in level for chain in spec.chains().values() for level in chain):
        spec.soft = True
    pair = st.tuples(st.floats(0.01, 0.3), st.floats(0.01, 0.3))
    for name in spec.budgets:
        key = draw(st.sampled_from(name.rpartition(":")[2].split("+")))
        spec.budgets[name] = draw(pair | st.builds(lambda a, b, key=key: {"by": key, "*": a, 1: b}, pair, pair))
    return spec


@settings(max_examples=40, deadline=None)
@given(random_specs(), st.integers(0, 10_000))
def test_random_trees_match_the_oracle(spec: Spec, seed: int) -> None:
    assert_matches(random_case(seed, trajectories=5, longest=4, scale=0.2), spec, tolerance=1e-9)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgets": {"domain": {"by": "engine", "*": TIGHT}}}, "'engine', which is no key of level 'domain'"),
        ({"budgets": {"domain": {"by": "trajectory", "*": TIGHT}}}, r"choose one of \['domain'\]"),
        ({"budgets": {"domain": {"*": TIGHT, -1: TIGHT}}}, "domain -1, which is unknown; ids of domain are numbers"),
        ({"budgets": {"domain": {"maths": TIGHT}}}, r"budgets\['domain'\] has an entry for domain 'maths'"),
        (
            {"budgets": {"domain": {"maths": TIGHT}}, "names": {"domain": {"math": 0, "code": 1}}},
            "domain 'maths', which is unknown; the names of domain are 'math', 'code'",
        ),
        ({"budgets": {"domain": {"2": TIGHT}}, "names": {"domain": {"math": 0, "code": 1}}}, "domain '2', which is un"),
        ({"budgets": {"domain": {1: TIGHT, "1": TIGHT}}}, "lists domain '1' twice"),
        ({"budgets": {"domain": {1: 0.1}}}, r"budgets\['domain'\]\[1\] is 0.1; pass a pair"),
        ({"budgets": {"domain": {1: (0.1, 0.0)}}}, r"C_minus of level 'domain \(domain 1\)' is 0.0"),
        ({"names": {"domain": {"1": 0}}}, "domain 0 has the name '1'.*choose another name"),
        (
            {"levels": [["domain", "turn"]], "budgets": {"domain+turn": {1: TIGHT}}},
            "does not say whose ids it lists; add",
        ),
        ({"levels": [["session"]], "budgets": {"session": {1: TIGHT}}}, "and level 'session' has no default"),
        ({"levels": {"*": [["domain"]]}}, "levels has 'by' = None; a tree needs a key of which every token has one id"),
        ({"levels": {"by": "expert", "*": [["domain"]]}}, "levels has 'by' = 'expert'"),
        ({"levels": {"by": "domain"}}, "holds no chain; add '\\*'"),
        ({"levels": {"by": "domain", "*": ["domain"]}}, "a level must be a non-empty list"),
        ({"levels": {"by": "domain", "x": [["domain"]]}}, "levels has an entry for domain 'x', which is unknown"),
        ({"levels": SEPARATE, "budgets": {"trajectory": TIGHT}}, r"\['trajectory'\].*its levels are \['\*:traj"),
    ],
)
def test_refused(options: dict, words: str) -> None:
    levels = {"levels": [["trajectory"], ["domain"]], "budgets": {}} | options
    if "levels" not in options:
        levels["budgets"] = {"trajectory": TIGHT, "domain": TIGHT} | options.get("budgets", {})
    with pytest.raises(ValueError, match=words):
        build_objective("fiberpo", **levels)


def test_without_an_entry_for_all_others_the_default_of_the_level_holds() -> None:
    case = random_case(3)
    listed = build_objective("fiberpo", budgets={"trajectory": {2: WIDE}}, epsilon=0.03)
    written = build_objective("fiberpo", budgets={"trajectory": {"*": (0.12, 0.10), "2": WIDE}}, epsilon=0.03)
    assert torch.equal(case.call(listed).gradient, case.call(written).gradient)


def test_names_stand_for_ids_and_appear_in_metrics() -> None:
    case = random_case(3)
    names = {"domain": {"math": 1, "code": 0}}
    levels = {"by": "domain", "*": [["trajectory"], ["domain"]], "math": [["turn"], ["domain"]]}
    budgets = {"math:turn": TIGHT, "*:trajectory": TIGHT, "domain": {"math": WIDE, "*": TIGHT}}
    named = build_objective("fiberpo", names=names, levels=levels, budgets=budgets)
    assert named.level_names == ("*:trajectory", "math:turn", "domain")
    levels[1], budgets["1:turn"] = levels.pop("math"), budgets.pop("math:turn")
    budgets["domain"] = {1: WIDE, "*": TIGHT}
    out, plain = case.call(named), case.call(build_objective("fiberpo", levels=levels, budgets=budgets))
    assert torch.equal(out.gradient, plain.gradient)
    assert "gate/math:turn/nodes" in out.metrics.as_dict() and "gate/1:turn/nodes" in plain.metrics.as_dict()


def test_ids_that_a_call_does_not_have_are_refused() -> None:
    case = labelled(3)
    counts = counts_of(case)
    objective = build_objective("fiberpo", budgets={"trajectory": {"*": TIGHT, counts["trajectory"]: WIDE}})
    with pytest.raises(ValueError, match=f"list trajectory {counts['trajectory']}, but its ids run from 0 to"):
        case.call(objective, counts=counts)
    experts = build_objective(
        "fiberpo",
        levels=[["trajectory", "expert"]],
        budgets={"trajectory+expert": {"by": "expert", "*": TIGHT, 3: WIDE}},
    )
    with pytest.raises(ValueError, match="list expert 3, but its ids run from 0 to 2"):
        case.call(experts)
    with pytest.raises(ValueError, match=r"labels\['turn'\] has \d+ numbers, but counts\['turn'\] is"):
        case.call(SPECS["nodes by number"].build(build_objective), counts=counts | {"turn": counts["turn"] + 1})


def test_a_token_without_a_branch_is_named() -> None:
    case = random_case(11)
    assert set(case.ids["domain"].tolist()) == {0, 1}
    levels = {"by": "domain", 1: [["trajectory"]]}
    objective = build_objective("fiberpo", levels=levels)
    with pytest.raises(ValueError, match=re.escape("levels by 'domain' has no chain for domain 0; add one, or '*'")):
        case.call(objective)
    part = (case.ids["domain"] == 1).nonzero().squeeze(1)
    assert torch.equal(case.call(objective, part).gradient, case.call(build_objective("fiberpo"), part).gradient)


def test_levels_of_a_branch_that_do_not_nest_are_named() -> None:
    levels = {"by": "domain", "*": [["trajectory"], ["prompt_group"]], 1: [["prompt_group"], ["trajectory"]]}
    objective = tight(levels).build(build_objective)
    with pytest.raises(ValueError, match="level '1:prompt_group' is not nested in level '1:trajectory': node"):
        random_case(0, trajectories=12).call(objective)


def test_a_tree_needs_the_key_of_its_branches() -> None:
    tree = build_objective("fiberpo", levels=SEPARATE, budgets=tight(SEPARATE).budgets)
    assert tree.keys == ("trajectory", "turn", "prompt_group", "domain") and tree.uses_experts
    with pytest.raises(ValueError, match=r"level '1:turn\+expert' of objective 'fiberpo' needs the key 'turn'"):
        tree.check_keys(("trajectory", "prompt_group", "domain", "expert"))
