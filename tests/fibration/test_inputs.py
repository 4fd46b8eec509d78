"""Malformed input: a ValueError that names what, where, the value and the fix."""

from __future__ import annotations

import pytest
import torch

from fiberpo_megatron.fibration import build_objective
from tests.fibration.oracle import Case, random_case


def broken(change: str) -> Case:
    case = random_case(1)
    if change == "nan":
        case.x[4] = float("nan")
    elif change == "infinite advantage":
        case.advantages[2] = float("inf")
    elif change == "nan weight":
        case.weights[1] = float("nan")
    elif change == "negative weight":
        case.weights[3] = -0.25
    elif change == "half":
        case.x = case.x.half()
    elif change == "padded":
        case.x = case.x.unsqueeze(0)
    elif change == "short advantages":
        case.advantages = case.advantages[1:]
    elif change == "negative id":
        case.ids["trajectory"] = case.ids["trajectory"] - 1
    elif change == "float id":
        case.ids["trajectory"] = case.ids["trajectory"].double()
    elif change == "short ids":
        case.ids["domain"] = case.ids["domain"][1:]
    elif change == "missing key":
        del case.ids["prompt_group"]
    elif change == "no share":
        case.share = None
    elif change == "share sum":
        case.share[5] *= 0.5
    elif change == "negative share":
        case.share[5] = torch.tensor([1.5, -0.5, 0.0])
    elif change == "nan share":
        case.share[5, 0] = float("nan")
    elif change == "flat share":
        case.share = case.share[:, 0]
    return case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"log_ratio\[4\] is nan"),
        ("infinite advantage", r"advantages\[2\] is inf"),
        ("nan weight", r"weights\[1\] is nan"),
        ("negative weight", r"weights\[3\] is -0.25; .* must not be negative"),
        ("half", "cast it to float32 or float64"),
        ("padded", "flatten it"),
        ("short advantages", "advantages has shape"),
        ("negative id", r"keys\['trajectory'\]\[0\] is -1, outside 0\.\."),
        ("float id", "ids must be int64 or int32"),
        ("short ids", r"keys\['domain'\] has shape"),
        ("missing key", r"pass keys\['prompt_group'\]"),
        ("no share", "pass expert_share"),
        ("share sum", r"level key 'expert': expert_share\[5\] sums to 0.5.*divide each"),
        ("negative share", r"expert_share\[5\] holds -0.5"),
        ("nan share", "expert_share.* is nan"),
        ("flat share", r"must be \[N, P\]"),
    ],
)
def test_refused(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        broken(change).call(build_objective("fiberpo-expert"))


def test_an_id_beyond_counts() -> None:
    case = random_case(1)
    counts = {key: int(ids.max()) + 1 for key, ids in case.ids.items()}
    case.call(build_objective("fiberpo-domain"), counts=counts)
    counts["prompt_group"] -= 1
    with pytest.raises(ValueError, match=r"keys\['prompt_group'\]\[\d+\] is \d, outside 0\.\."):
        case.call(build_objective("fiberpo-domain"), counts=counts)
    del counts["prompt_group"]
    with pytest.raises(ValueError, match="counts lacks key 'prompt_group'"):
        case.call(build_objective("fiberpo-domain"), counts=counts)


@pytest.mark.parametrize("level", ["prompt_group", "domain"])
def test_not_nested_inside_a_trajectory(level: str) -> None:
    case = random_case(1)
    trajectory = case.ids["trajectory"]
    at = (trajectory == trajectory.bincount().argmax()).nonzero().squeeze(1)
    case.ids[level] = case.ids[level].clone()
    case.ids[level][at[-1]] = 1 - case.ids[level][at[-1]].clamp(max=1)
    node = int(trajectory[at[0]])
    message = rf"'trajectory' is not nested in level '{level}': node \(trajectory {node}\) has tokens of several"
    with pytest.raises(ValueError, match=message):
        case.call(build_objective("fiberpo-domain"))


def test_not_nested_between_coarser_levels() -> None:
    """Every trajectory has one group and one domain, but a group lies in two domains."""
    ids = {
        "trajectory": torch.tensor([0, 1, 2]),
        "prompt_group": torch.tensor([0, 0, 1]),
        "domain": torch.tensor([0, 1, 1]),
    }
    one = torch.ones(3, dtype=torch.float64)
    case = Case(0 * one, one, one / 3, ids, None)
    with pytest.raises(ValueError, match=r"'prompt_group' is not nested in level 'domain': node \(prompt_group 0\)"):
        case.call(build_objective("fiberpo-domain"))


def test_a_table_too_large() -> None:
    one = torch.ones(1)
    objective = build_objective("fiberpo", levels=[["a", "b"]], budgets={"a+b": (0.3, 0.2)})
    ids = {"a": torch.tensor([0]), "b": torch.tensor([0])}
    objective(one, one, one, keys=ids, counts={"a": 100, "b": 100})
    with pytest.raises(ValueError, match=r"level 'a\+b' needs a table of 1000000000000 x 1 nodes"):
        objective(one, one, one, keys=ids, counts={"a": 10**6, "b": 10**6})


def test_int32_ids_and_unused_arguments_are_accepted() -> None:
    case = random_case(1)
    wide = case.call(build_objective("fiberpo"))
    case.ids = {key: ids.int() for key, ids in case.ids.items()}
    assert torch.equal(case.call(build_objective("fiberpo")).gradient, wide.gradient)
    case.share = None
    assert torch.equal(case.call(build_objective("fiberpo")).gradient, wide.gradient)


def test_the_package_needs_no_gradient_graph() -> None:
    case = random_case(1)
    case.x.requires_grad_(True)
    assert not case.call(build_objective("fiberpo")).gradient.requires_grad
