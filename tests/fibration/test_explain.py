"""A call explains its tokens: sums, budgets and states of every level, and the bounds of the clips."""

from __future__ import annotations

import math

import pytest
import torch

from fiberpo_megatron.fibration import OBJECTIVES, build_objective
from fiberpo_megatron.fibration.explain import PASS, ROLLBACK, ZEROED, LevelGates
from tests.fibration.oracle import random_case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BUDGETS = {
    "fiberpo": {"trajectory": (0.05, 0.02)},
    "fiberpo-domain": {"trajectory": (0.05, 0.02), "prompt_group": (0.03, 0.02), "domain": (0.02, 0.01)},
    "fiberpo-expert": {
        "trajectory+expert": (0.05, 0.02),
        "trajectory": (0.05, 0.02),
        "prompt_group": (0.03, 0.02),
        "domain": (0.02, 0.01),
    },
}


def node_of(level: LevelGates, ids: dict[str, int]) -> int:
    (place,) = [n for n in range(level.ids.shape[1]) if level.ids[:, n].tolist() == [ids[key] for key in level.keys]]
    return place


@pytest.mark.parametrize("name", BUDGETS)
def test_every_level_is_that_of_the_definition(name: str):
    case = random_case(3)
    objective = build_objective(name, epsilon=0.1, budgets=BUDGETS[name])
    out = case.call(objective)
    assert out.trace is not None
    index = torch.arange(0, case.x.shape[0], 3)
    found = out.trace.explain(index)
    torch.testing.assert_close(found.gated_ratio, out.gated_ratio[index], rtol=0, atol=0)
    x, mu, ids = case.x.double(), case.weights.double(), case.ids
    partitions = case.share.shape[1] if "expert" in name else 1
    share = case.share.double() if "expert" in name else torch.ones(len(x), 1)

    def sums(keys: tuple[str, ...], of: dict[str, int]) -> tuple[list[float], float]:
        inside = torch.stack([ids[key] == of[key] for key in keys if key != "expert"]).all(0)
        kernel = share[:, of["expert"]] if "expert" in keys else torch.ones(len(x))
        weight = mu * kernel * inside
        channels = [float((weight * x.mul(sign).clamp(min=0)).sum() / weight.sum()) for sign in (1, -1)]
        return channels, float((kernel * inside).sum())

    seen = set()
    for place, level in enumerate(found.levels):
        assert level.level == "+".join(level.keys)
        for row, token in enumerate(index.tolist()):
            for partition in range(partitions):
                of = {key: int(values[token]) for key, values in ids.items()} | {"expert": partition}
                if "expert" in level.keys and not share[token, partition]:
                    continue
                node = node_of(level, of)
                own, count = sums(level.keys, of)
                above = [0.0, 0.0]
                if place + 1 < len(found.levels):
                    above, _ = sums(found.levels[place + 1].keys, of)
                mine = (level.token == row) & (level.node == node)
                expected = float(share[token, partition]) if "expert" in level.keys else 1.0
                assert level.share[mine].tolist() == pytest.approx([expected])
                for channel in (0, 1):
                    residual, budget = own[channel] - above[channel], BUDGETS[name][level.level][channel]
                    assert float(level.aggregate[channel, node]) == pytest.approx(own[channel], abs=1e-12)
                    assert float(level.residual[channel, node]) == pytest.approx(residual, abs=1e-12)
                    assert float(level.budget[channel, node]) == budget
                    k = max(1.0, count)
                    assert float(level.tokens[node]) == pytest.approx(k)
                    beyond = abs(residual) / budget
                    state = PASS if beyond <= 1 else ROLLBACK if beyond < 1 + 1 / k else ZEROED
                    assert int(level.state[channel, node]) == state
                    seen.add(state)
    assert {PASS, ZEROED} <= seen
    assert found.clip is not None and found.free is not None
    assert torch.equal(found.free, (found.clip.value.abs() <= 0.1))


def test_a_small_excess_is_rolled_back():
    objective = build_objective("fiberpo", epsilon=1.0, budgets={"trajectory": (0.1, 0.1)})
    x = torch.tensor([0.21, 0.0, -0.3, -0.3], dtype=torch.float64)
    ids = {"trajectory": torch.tensor([0, 0, 1, 1])}
    out = objective(x, torch.ones(4), torch.full((4,), 0.25), keys=ids, counts={"trajectory": 2})
    (level,) = out.trace.explain(torch.arange(4)).levels
    assert level.ids.tolist() == [[0, 1]]
    assert level.state.tolist() == [[ROLLBACK, PASS], [PASS, ZEROED]]
    torch.testing.assert_close(level.aggregate, torch.tensor([[0.105, 0.0], [0.0, 0.3]], dtype=torch.float64))


SAID = {  # objective: (what it clips, x at which it clips a good token, the bound)
    "ppo": ("ratio", 0.5, 1.2),
    "grpo": ("ratio", 0.5, 1.2),
    "drgrpo": ("ratio", 0.5, 1.2),
    "dapo": ("ratio", 0.5, 1.28),
    "reinforce++": ("ratio", 0.5, 1.2),
    "cispo": ("ratio", 2.0, 5.0),
    "gspo": ("ratio of the trajectory", 0.5, 1.0004),
    "gmpo": ("log ratio", 0.5, 0.4),
    "dppo": ("probability change", 0.9, 0.15),
    "apc": ("change |ratio - 1|", 0.5, 0.22),
    "apc-trajectory": ("change |ratio - 1|", 0.5, 0.22),
    "fiberpo": ("residual", 0.5, 0.05),
    "fiberpo-domain": ("residual", 0.5, 0.05),
    "fiberpo-expert": ("residual", 0.5, 0.05),
    "fiberpo-expert-global": ("residual", 0.5, 0.05),
    "sapo": None,
    "reinforce": None,
    "rloo": None,
}


def test_every_objective_says_what_it_clips():
    assert set(SAID) == set(OBJECTIVES)


@pytest.mark.parametrize("name", SAID)
def test_a_clip_is_named_with_its_bound(name: str):
    objective, said = build_objective(name), SAID[name]
    x = torch.tensor([0.5 if said is None else said[1], 0.0])
    ids = {key: torch.tensor([0, 1]) for key in ("trajectory", "prompt_group", "domain")}
    ids["state"] = torch.tensor([-1, -1])
    if name.startswith("fiberpo"):  # two tokens of one trajectory, so that its mean is not the token's own ratio
        ids = {key: torch.tensor([0, 0]) for key in ids}
    out = objective(
        x,
        torch.ones(2),
        torch.full((2,), 0.5),
        keys=ids,
        counts=dict.fromkeys(ids, 2),
        expert_share=torch.ones(2, 1),
        old_log_probs=torch.full((2,), -1.0),
    )
    found = out.trace.explain(torch.tensor([1, 0]))
    torch.testing.assert_close(found.gated_ratio, out.gated_ratio[[1, 0]], rtol=0, atol=0)
    if said is None:
        assert found.clip is None and found.free is None
        return
    figure, _, bound = said
    assert found.clip.figures[int(found.clip.figure[1])] == figure
    assert float(found.clip.high[1]) == pytest.approx(bound, rel=1e-6)
    assert found.free.tolist()[1] is False and float(found.clip.value[1]) > bound
    if not name.startswith("fiberpo"):
        assert found.free.tolist()[0] is True and float(found.clip.value[0]) <= bound


@pytest.mark.parametrize(
    ("options", "x", "advantage", "figure", "high", "free"),
    [
        ({"dual_clip": 3.0}, 2.0, -1.0, "ratio", 3.0, False),
        ({"dual_clip": 3.0}, 0.5, -1.0, "ratio", 3.0, True),
        ({"pessimistic": True}, 2.0, -1.0, "ratio", math.inf, True),
        ({"pessimistic": True, "dual_clip": 3.0}, 2.0, -1.0, "ratio", 3.0, False),
        ({"unclip_positive": True}, -0.5, 1.0, "ratio", math.inf, True),
        ({}, 2.0, -1.0, "residual", 0.05, False),
    ],
)
def test_tokens_on_the_raw_ratio_are_named_so(options, x, advantage, figure, high, free):
    objective = build_objective("fiberpo", **options)
    ids = {"trajectory": torch.zeros(8, dtype=torch.int64)}
    ratios = torch.tensor([x] + 7 * [0.0])
    out = objective(ratios, torch.full((8,), advantage), torch.full((8,), 0.125), keys=ids)
    found = out.trace.explain(torch.tensor([0]))
    assert found.clip.figures[int(found.clip.figure)] == figure
    assert float(found.clip.high) == pytest.approx(high)
    assert found.free.tolist() == [free]


def test_a_call_without_metrics_keeps_nothing():
    case = random_case(0)
    assert case.call(build_objective("fiberpo"), metrics=False).trace is None
