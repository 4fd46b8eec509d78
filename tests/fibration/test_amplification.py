"""The largest |c| / (mu |A|) and where it comes from: against a count by hand, for any order and cut of the tokens."""

from __future__ import annotations

import pytest
import torch

from fiberpo_megatron.fibration import PRESET_LEVELS, build_objective
from tests.fibration.oracle import Case, random_case
from tests.fibration.ranks import run_ranks
from tests.fibration.test_layout import counts_of, cut

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TIGHT = (0.06, 0.05)


def tight(name: str):
    return build_objective(name, epsilon=0.1, budgets={"+".join(level): TIGHT for level in PRESET_LEVELS[name]})


def sizes(case: Case, gradient: torch.Tensor) -> torch.Tensor:
    scale = (case.weights * case.advantages).abs()
    return torch.where(scale > 0, gradient.abs() / scale, 0.0)


@pytest.mark.parametrize("name", list(PRESET_LEVELS))
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_largest_of_all_tokens(name: str, seed: int) -> None:
    case = random_case(seed)
    case.advantages[::3] = 0.0
    case.weights[int(case.x.argmin())] = 0.0
    out = case.call(tight(name))
    found = sizes(case, out.gradient)
    assert out.amplification.value == pytest.approx(float(found.max()), rel=1e-15)
    at = int(found.argmax())
    ids = {key: int(case.ids[key][at]) for key in out.amplification.node if key != "expert"}
    assert out.amplification.node == ids | {k: v for k, v in out.amplification.node.items() if k == "expert"}


def rollback() -> Case:
    """Trajectory 1 of four tokens is in rollback, with S+ = 0.11 between C+ = 0.1 and (1 + 1/4) C+; trajectory 0 is
    not."""
    x = torch.tensor([0.01, 0.01, 0.11, 0.11, 0.11, 0.11], dtype=torch.float64)
    ids = {"trajectory": torch.tensor([0, 0, 1, 1, 1, 1])}
    return Case(x, torch.ones_like(x), torch.full_like(x, 1 / 6), ids)


def test_rollback_by_hand() -> None:
    case = rollback()
    out = case.call(build_objective("fiberpo", epsilon=0.05, budgets={"trajectory": (0.1, 0.09)}))
    # log G = 5 * 0.1 - 4 * 0.11 = 0.06; own clips are free, so that c / mu = G - 5 W / M = -4 G.
    it = out.amplification
    assert it.value == pytest.approx(4 * torch.tensor(0.06, dtype=torch.float64).exp().item(), rel=1e-12)
    assert (it.level, it.node) == ("trajectory", {"trajectory": 1})
    bounded = case.call(build_objective("fiberpo", epsilon=0.05, budgets={"trajectory": (0.1, 0.09)}, k_max=1))
    assert bounded.amplification.value < 1.2


def test_without_active_gates_it_is_the_tokens_own() -> None:
    case = random_case(1)
    case.x.zero_()
    it = case.call(build_objective("fiberpo-expert")).amplification
    assert (it.value, it.level, it.node) == (1.0, "token", {"trajectory": 0})


def test_none_without_metrics_levels_or_gradients() -> None:
    case = random_case(1)
    assert case.call(tight("fiberpo"), metrics=False).amplification is None
    assert case.call(build_objective("grpo")).amplification is None
    case.advantages.zero_()
    assert case.call(tight("fiberpo")).amplification is None


@pytest.mark.parametrize("name", ["fiberpo", "fiberpo-expert"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_order_and_cut_do_not_matter(name: str, on_policy: bool) -> None:
    case = random_case(1)
    if on_policy:
        case.x.zero_()  # every token has the value 1
    objective = tight(name)
    alone = case.call(objective).amplification
    order = torch.randperm(case.x.shape[0], generator=torch.Generator().manual_seed(3))
    assert case.call(objective, order).amplification == alone
    parts = cut(case, 3, 0, trajectories_whole=False)
    outputs, _ = run_ranks(objective, case, parts, counts=counts_of(case))
    found = [out.amplification for out in outputs if out.amplification is not None]
    first = min(found, key=lambda it: (-it.value, it.order))
    assert first.value == pytest.approx(alone.value, rel=1e-12)
    assert (first.level, first.node, first.order) == (alone.level, alone.node, alone.order)
