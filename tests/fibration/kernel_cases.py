"""The fused kernels against the torch passes: on CPU tensors in Triton's interpreter, else on a GPU.

Run by test_kernels.py in a process of its own with Triton on the path, which the other tests' environment must not
hold; TRITON_INTERPRET=1 chooses the interpreter.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from fiberpo_megatron.fibration import OBJECTIVES, PRESET_LEVELS, build_objective, objective_class
from fiberpo_megatron.fibration.explain import Explanation
from fiberpo_megatron.fibration.kernels import fused, run_plan, token_kernels
from tests.fibration import oracle
from tests.fibration.oracle import Case
from tests.fibration.ranks import joined
from tests.fibration.topr import TOPR
from tests.fibration.topr_kernel import FusedTOPR
from tests.variations import varied

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import device_operations  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DEVICE = "cuda" if isinstance(token_kernels.first_pass, triton.JITFunction) else "cpu"
TIGHT = (0.06, 0.05)
PRESETS = [(name, soft) for name in PRESET_LEVELS for soft in ((True, False) if "expert" in name else (True,))]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def preset(name: str, *, soft: bool = True, **options):
    """Gates and clips are active on `hard_case`."""
    budgets = {"+".join(level): TIGHT for level in PRESET_LEVELS[name]}
    membership = ("soft" if soft else "hard") if "expert" in name else None
    return build_objective(name, **{"epsilon": 0.1, "budgets": budgets, "expert_membership": membership, **options})


def on_device(case: Case) -> Case:
    ids = {key: value.to(DEVICE) for key, value in case.ids.items()}
    flat = (tensor.to(DEVICE) for tensor in (case.x, case.advantages, case.weights))
    return Case(*flat, ids, case.share.to(DEVICE))


def random_case(seed: int, **options) -> Case:
    return on_device(oracle.random_case(seed, **options))


def hard_case(dtype: torch.dtype = torch.float64, *, partitions: int = 3, seed: int = 0) -> Case:
    """Trajectories of 1 to 1,200 tokens, two of them in several places; zeros, clamped and weightless tokens.

    Every run of equal ids is a program, whose cost in the interpreter hardly depends on its tokens.
    """
    draw = torch.Generator().manual_seed(seed)
    block = fused.block_size(1, dtype)
    lengths = torch.tensor([1, 40, block, block + 176, 1, 17, 60])
    trajectory = torch.repeat_interleave(torch.arange(7), lengths)
    order = torch.cat([torch.arange(20, trajectory.shape[0]), torch.arange(20)])  # trajectory 1 begins at the end
    order[-3:] = order[-3:].roll(1)
    order[[100, 2200]] = order[[2200, 100]]  # and single tokens of two others lie inside one another
    trajectory = trajectory[order]
    n = trajectory.shape[0]
    x = 0.15 * torch.randn(n, generator=draw, dtype=torch.float64)
    x[trajectory == 2] += 0.1
    x[torch.rand(n, generator=draw) < 0.1] = 0.0
    x[[7, 2000, n - 5]] = torch.tensor([25.0, -31.0, 20.0], dtype=torch.float64)
    advantages = torch.randn(7, generator=draw, dtype=torch.float64)[trajectory]
    advantages[trajectory == 5] = 0.0
    weights = 1.0 / (7.0 * lengths.double()[trajectory])
    weights[[3, 500, 501]] = 0.0
    share = torch.rand(n, partitions, generator=draw, dtype=torch.float64)
    share[::5, 0] = share[::5].amax(1)  # a tie, or the maximum twice
    share[1::5, 1] = 0.0
    share = (share.to(dtype) / share.to(dtype).sum(1, keepdim=True)).contiguous()
    group = trajectory // 2
    ids = {"trajectory": trajectory, "prompt_group": group, "domain": group // 2}
    place = torch.arange(n)  # every change of state is a run of its own, and a program of the interpreter
    ids["state"] = torch.where((place < 24) | (place > n - 8), place % 5 + (place == 11) * 5, -1)
    return on_device(Case(x.to(dtype), advantages.to(dtype), weights.to(dtype), ids, share))


def assert_same(objective, case: Case, part: torch.Tensor | None = None, **options) -> None:
    expected = case.call(replace(objective, kernels=False), part, **options)
    found = case.call(replace(objective, kernels=True), part, **options)
    tolerance = TOLERANCE[case.x.dtype]
    for name in ("gated_ratio", "gradient", "value"):
        left, right = getattr(found, name), getattr(expected, name)
        assert left.dtype == right.dtype
        scale = float(right.abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(
            left, right, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    if expected.amplification is None:
        assert found.amplification is None
    else:
        left, right = found.amplification, expected.amplification
        assert (left.level, left.node, left.order) == (right.level, right.node, right.order)
        assert left.value == pytest.approx(right.value, rel=10 * tolerance)
    if found.metrics is not None:
        wide = dict.fromkeys(expected.metrics.as_dict(), None) | found.metrics.as_dict()
        assert wide == pytest.approx(expected.metrics.as_dict(), rel=10 * tolerance, abs=tolerance, nan_ok=True)
        assert found.trace is not None and expected.trace is not None
        index = torch.arange(0, found.gradient.shape[0], 97, device=DEVICE)
        same_explanation(found.trace.explain(index), expected.trace.explain(index), 10 * tolerance)


def same_explanation(found: Explanation, expected: Explanation, tolerance: float) -> None:
    for own, other in zip(found.levels, expected.levels, strict=True):
        for name in ("ids", "state", "token", "node", "budget"):
            assert torch.equal(getattr(own, name), getattr(other, name)), name
        for name in ("aggregate", "residual", "tokens", "share"):
            left, right = getattr(own, name), getattr(other, name)
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    for left, right in ((found.free, expected.free), (found.clip is None, expected.clip is None)):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left is right
    if found.clip is not None and expected.clip is not None:
        assert found.clip.figures == expected.clip.figures and torch.equal(found.clip.figure, expected.clip.figure)
        torch.testing.assert_close(found.clip.value, expected.clip.value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("of", varied(PRESETS, [("fiberpo", True), ("fiberpo-expert", True)]), ids=str)
def test_presets(of: tuple[str, bool]) -> None:
    name, soft = of
    assert_same(preset(name, soft=soft), hard_case())


@pytest.mark.parametrize("name", varied(["fiberpo", "fiberpo-domain"], ["fiberpo"]))  # and test_trees
def test_float32(name: str) -> None:
    assert_same(preset(name), hard_case(torch.float32))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("fiberpo", {"dual_clip": 1.2}, marks=pytest.mark.exhaustive),
        pytest.param("fiberpo", {"unclip_positive": True}, marks=pytest.mark.exhaustive),
        ("fiberpo-domain", {"pessimistic": True, "dual_clip": 1.2, "epsilon": (0.03, 0.02)}),
        pytest.param("fiberpo", {"pessimistic": True}, marks=pytest.mark.exhaustive),
        pytest.param("fiberpo", {"k_max": 5}, marks=pytest.mark.exhaustive),
        pytest.param("fiberpo-domain", {"k_max": 30.5}, marks=pytest.mark.exhaustive),
        pytest.param(
            "fiberpo-expert",
            {"dual_clip": 1.2, "unclip_positive": True, "epsilon": (0.03, 0.02)},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=str,
)
def test_overlays(name: str, options: dict) -> None:
    assert_same(preset(name, **options), hard_case(seed=1))


WITH_KERNEL = [name for name in OBJECTIVES if name not in PRESET_LEVELS and objective_class(name).kernel]


@pytest.mark.parametrize("name", varied(WITH_KERNEL, ["ppo", "gspo", "apc"]))  # most others share formulas
def test_other_objectives(name: str) -> None:
    for dtype in (torch.float64,) if name == "apc" else TOLERANCE:
        assert_same(build_objective(name), hard_case(dtype))


def test_one_long_node_and_many_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finest node of more runs than are added side by side, and P that is no power of two."""
    monkeypatch.setattr(run_plan, "RUNS_AT_ONCE", 4)
    case = random_case(3, trajectories=11, longest=1, partitions=5)
    levels = [["all", "expert"], ["all"]]
    budgets = {"all+expert": TIGHT, "all": TIGHT}
    assert_same(build_objective("fiberpo", levels=levels, budgets=budgets, epsilon=0.1), case)


@pytest.mark.exhaustive
def test_six_levels() -> None:
    """Two keys in the finest level, expert partitions in some levels, tokens in any order."""
    case = random_case(5, trajectories=4, longest=3)
    order = torch.randperm(case.x.shape[0], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = {key: value[order] for key, value in case.ids.items()}
    case = Case(case.x[order], case.advantages[order], case.weights[order], ids, case.share[order])
    fine = [["prompt_group", "trajectory", "expert"], ["pair", "expert"], ["pair"]]
    levels = [*fine, ["prompt_group"], ["half"], ["domain"]]
    budgets = {"+".join(level): TIGHT for level in levels}
    assert_same(build_objective("fiberpo", levels=levels, budgets=budgets, epsilon=0.1), case)


def test_the_first_step_is_exact() -> None:
    """At log ratio zero G is 1 and the gradient is mu A, bit for bit."""
    case = hard_case(torch.float32)
    case.x.zero_()
    out = case.call(preset("fiberpo-domain", kernels=True))
    assert torch.equal(out.gated_ratio, torch.ones_like(case.x))
    assert torch.equal(out.gradient, case.weights * case.advantages)


class _Asked(Exception):
    """A rank asks for a sum that the other ranks have not given their share of yet."""


def in_turn(objective, case: Case, parts: list[torch.Tensor], **options) -> list:
    """Outputs or errors of one call per rank, one after the other: the interpreter runs one kernel at a time. A rank
    that asks for a sum for the first time is stopped, and called again when all ranks have asked."""
    totals: list[torch.Tensor] = []
    while True:
        outputs, asked = [], []
        for part in parts:
            known = iter(totals)

            def reduce(flat: torch.Tensor, known=known, asked=asked) -> torch.Tensor:
                total = next(known, None)
                if total is None:
                    asked.append(flat.clone())
                    raise _Asked
                return total.clone()

            with contextlib.suppress(_Asked):
                try:
                    outputs.append(case.call(objective, part, reduce=reduce, **options))
                except ValueError as error:
                    outputs.append(error)
        if not asked:
            return outputs
        totals.append(torch.stack(asked).sum(0))


@pytest.mark.parametrize("name", varied(["fiberpo-domain", "fiberpo-expert"], ["fiberpo-domain"]))
def test_three_ranks_of_which_one_is_empty(name: str) -> None:
    """Compare ranks that share the tokens with one; test_a_tree_on_two_ranks has experts on two."""
    case = random_case(2, trajectories=3, longest=4)
    objective = preset(name, kernels=True)
    order = torch.randperm(case.x.shape[0], generator=torch.Generator().manual_seed(0))
    parts = [order[:3], order[3:], order[:0]]
    parts = [part.to(DEVICE) for part in parts]
    counts = {key: int(ids.max()) + 1 for key, ids in case.ids.items()}
    alone = case.call(replace(objective, kernels=False))
    outputs = in_turn(objective, case, parts, counts=counts)
    torch.testing.assert_close(joined(outputs, parts, "gradient"), alone.gradient, rtol=1e-10, atol=1e-15)
    fused = case.call(objective)
    for name in ("gradient", "gated_ratio"):
        assert torch.equal(joined(outputs, parts, name), getattr(fused, name))
    for out in outputs:
        assert out.metrics == fused.metrics


def test_without_metrics_and_strided_inputs() -> None:
    case = random_case(4, trajectories=3)
    case.x = torch.stack([case.x, case.x], dim=1)[:, 0]
    case.share = torch.stack([case.share, case.share], dim=2)[..., 0]
    assert not case.x.is_contiguous()
    assert_same(preset("fiberpo-expert"), case, metrics=False)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "words"),
    [
        ("ppo", "x", float("nan"), r"log_ratio\[4\] is nan"),
        ("ppo", "advantages", float("inf"), r"advantages\[4\] is inf"),
        ("ppo", "weights", -0.25, r"weights\[4\] is -0.25"),
        ("fiberpo-expert", "share", 0.25, r"expert_share\[4\] sums to 0.75, not 1"),
    ],
)
def test_malformed_tokens_are_named(name: str, tensor: str, value: float, words: str) -> None:
    case = random_case(1, trajectories=2)
    getattr(case, tensor)[4] = value
    with pytest.raises(ValueError, match=words):
        case.call(build_objective(name, kernels=True), metrics=False)


def test_malformed_ids_are_named() -> None:
    case = random_case(1, trajectories=3)
    counts = {key: int(ids.max()) + 1 for key, ids in case.ids.items()} | {"domain": 1}
    case.ids["domain"] = torch.zeros_like(case.ids["domain"])
    case.ids["domain"][3] = 1
    with pytest.raises(ValueError, match=r"keys\['domain'\]\[3\] is 1, outside 0..0"):
        case.call(preset("fiberpo-domain", kernels=True), counts=counts)
    case.ids["domain"][3] = -2
    with pytest.raises(ValueError, match=r"keys\['domain'\]\[3\] is -2"):
        case.call(preset("fiberpo-domain", kernels=True))


def test_levels_that_do_not_nest_are_named() -> None:
    case = random_case(1, trajectories=2)
    case.ids["prompt_group"] = case.ids["prompt_group"].clone()
    case.ids["prompt_group"][1] += 1
    with pytest.raises(
        ValueError, match=r"level 'trajectory' is not nested in level 'prompt_group': node \(trajectory 0"
    ):
        case.call(preset("fiberpo-domain", kernels=True))
    case = random_case(1, trajectories=2)
    case.ids["prompt_group"] = torch.zeros_like(case.ids["trajectory"])
    case.ids["domain"] = case.ids["trajectory"].clone()
    with pytest.raises(ValueError, match="level 'prompt_group' is not nested in level 'domain'"):
        case.call(preset("fiberpo-domain", kernels=True), metrics=False)


def test_a_malformed_token_on_one_rank_stops_all() -> None:
    case = random_case(2, trajectories=2)
    case.weights[0] = -1.0
    half = case.x.shape[0] // 2
    parts = [torch.arange(half, device=DEVICE), torch.arange(half, case.x.shape[0], device=DEVICE)]
    counts = {key: int(ids.max()) + 1 for key, ids in case.ids.items()}
    own, other = in_turn(build_objective("ppo", kernels=True), case, parts, counts=counts)
    assert "weights[0] is -1.0" in str(own) and "1 tokens of other ranks are malformed" in str(other)


BOUNDS = {  # device operations and waits of a call with metrics, and without
    "fiberpo-expert": (26, 2, 22, 2),
    "gspo": (19, 2, 16, 2),
    "ppo": (14, 2, 6, 1),
}


@pytest.mark.parametrize("name", list(BOUNDS))
def test_few_operations_and_waits(name: str) -> None:
    """On a GPU the fixed cost of a call is that of these, whatever the number of tokens."""
    case = random_case(0, trajectories=2)
    found = []
    for metrics in (True, False):
        done = device_operations.count(lambda m=metrics: case.call(build_objective(name, kernels=True), metrics=m))
        found += [done.operations, done.waits]
    assert all(left <= right for left, right in zip(found, BOUNDS[name], strict=True)), found


def test_no_kernels_with_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(ValueError, match="Triton is 3.3.1, but the kernels need 3.4 or newer"):
        random_case(0).call(build_objective("ppo", kernels=True))


# ---- objectives of one's own ----


def test_an_objective_brings_its_own_kernel() -> None:
    assert_same(FusedTOPR(bound_positive=1.1), hard_case())


def test_an_objective_without_a_kernel_runs_in_torch_on_every_device() -> None:
    """On a GPU this is the path that an unset `kernels` takes; here it shows that nothing asks for formulas."""
    case = hard_case()
    unset, torch_path = case.call(TOPR()), case.call(TOPR(kernels=False))
    assert torch.equal(unset.gradient, torch_path.gradient)


def test_a_kernel_that_is_no_formulas_is_named() -> None:
    class Odd(TOPR):
        kernel = "tests.fibration.topr_kernel:tl"

    with pytest.raises(
        ValueError, match="kernel of objective 'Odd' is 'tests.fibration.topr_kernel:tl', which is module"
    ):
        random_case(0).call(Odd(kernels=True))


# ---- budgets by node, and trees of levels ----


def by_node() -> dict:
    """Budgets by keys of a level, of a coarser one and of the finest, and by partition."""
    wide = (0.3, 0.2)
    return {
        "trajectory+expert": {"by": "expert", "*": TIGHT, 1: wide},
        "trajectory": {"by": "domain", "*": TIGHT, 1: wide},
        "prompt_group": {"*": TIGHT, 1: wide, 3: (0.02, 0.01)},
        "domain": {"*": TIGHT, 0: wide},
    }


@pytest.mark.parametrize("soft", varied([True, False], [True]))
def test_budgets_by_node(soft: bool) -> None:
    plain, listed = preset("fiberpo-expert", soft=soft), preset("fiberpo-expert", soft=soft, budgets=by_node())
    case = random_case(11)
    assert_same(listed, case)
    assert not torch.equal(case.call(listed).gradient, case.call(plain).gradient)


@pytest.mark.exhaustive
def test_budgets_by_node_of_the_finest_level() -> None:
    finest = {"by": "trajectory", "*": TIGHT, 1: (0.3, 0.2), 2: (0.01, 0.01)}
    assert_same(preset("fiberpo-expert", budgets={**by_node(), "trajectory+expert": finest}), random_case(11))


LEVELS = {  # branches of different depths, with and without experts, that share coarse levels or none
    "by": "prompt_group",
    "*": [["trajectory"], ["half"], ["all"]],
    1: [["turn", "expert"], ["trajectory"], ["half"], ["all"]],
    2: [["engine"]],
}


def a_tree(**options):
    named = ("1:turn+expert", "*,1:trajectory", "2:engine", "*,1:half", "*,1:all")
    budgets = dict.fromkeys(named, TIGHT) | {"1:turn+expert": {"by": "expert", "*": TIGHT, 1: (0.3, 0.2)}}
    return build_objective("fiberpo", levels=LEVELS, budgets=budgets, epsilon=0.1, **options)


@pytest.mark.parametrize(
    ("dtype", "membership", "size"), [(torch.float64, "soft", {}), (torch.float32, "hard", {"trajectories": 4})]
)
def test_trees(dtype: torch.dtype, membership: str, size: dict) -> None:
    case = random_case(11, **size)
    assert set(case.ids["prompt_group"].tolist()) == {0, 1, 2}
    for name in ("x", "advantages", "weights", "share"):
        setattr(case, name, getattr(case, name).to(dtype))
    assert_same(a_tree(expert_membership=membership), case)


def test_a_tree_on_two_ranks() -> None:
    case = random_case(11, trajectories=4, longest=3)
    assert len(set(case.ids["prompt_group"].tolist())) > 1
    half = case.x.shape[0] // 2
    parts = [torch.arange(half, device=DEVICE), torch.arange(half, case.x.shape[0], device=DEVICE)]
    counts = {key: int(ids.max()) + 1 for key, ids in case.ids.items()} | {"prompt_group": 3}
    alone = case.call(a_tree(kernels=False))
    outputs = in_turn(a_tree(kernels=True), case, parts, counts=counts, metrics=False)
    torch.testing.assert_close(joined(outputs, parts, "gradient"), alone.gradient, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(joined(outputs, parts, "gated_ratio"), alone.gated_ratio, rtol=1e-10, atol=0)


def test_a_tree_on_a_rank_without_tokens() -> None:
    case = random_case(11)
    assert case.call(a_tree(kernels=True), torch.arange(0, device=DEVICE)).gradient.shape == (0,)


def test_labels_of_ids() -> None:
    """Budgets by the place of a turn: its ids are those of the mini-batch."""
    case = random_case(2, trajectories=3)
    case.labels["turn"] = torch.arange(int(case.ids["turn"].max()) + 1) % 2
    budgets = {"turn": {"*": TIGHT, 1: (0.3, 0.2)}, "trajectory": TIGHT}
    levels = [["turn"], ["trajectory"]]
    assert_same(build_objective("fiberpo", levels=levels, budgets=budgets, epsilon=0.1), case)


def test_levels_of_a_branch_that_do_not_nest_are_named() -> None:
    case = random_case(11, trajectories=4)
    case.ids["half"] = case.ids["turn"] % 2
    with pytest.raises(ValueError, match="is not nested in level"):
        case.call(a_tree(kernels=True), metrics=False)
