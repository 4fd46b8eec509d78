"""Importance weights: each method against an oracle written from its definition, and in any order and cut."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.fibration import LevelBounds, build_objective, importance_weights
from fiberpo_megatron.fibration.importance import METHODS
from tests.fibration.ranks import Collective

COUNTS = {"trajectory": 7, "version": 3, "engine": 2, "prompt_group": 3, "domain": 2}
BOUNDS = LevelBounds(token=0.4, trajectory=0.1, version=0.15, mask_trajectory=0.35, mask_version=0.2, mask_engine=0.3)


def tokens(count: int = 120, seed: int = 0, spread: float = 0.8) -> tuple[Tensor, dict[str, Tensor]]:
    """Differences of float32 log-probs, and keys: every trajectory has several versions and both engines."""
    random = torch.Generator().manual_seed(seed)

    def ids(size: int) -> Tensor:
        return torch.randint(size, (count,), generator=random)

    trajectory = ids(COUNTS["trajectory"]).sort().values
    keys = {"trajectory": trajectory, "version": ids(3), "engine": ids(2)}
    keys |= {"prompt_group": trajectory // 3, "domain": trajectory // 6}
    old = -3.0 * torch.rand(count, generator=random)
    rollout = old + spread * torch.randn(count, generator=random)
    return old.double() - rollout.double(), keys


def oracle(y: Tensor, keys: dict[str, Tensor], method: str) -> list[float]:
    """The definitions, one token at a time, with cap 2, low 0.5 and high 5."""
    values = y.tolist()

    def mean(of: dict[str, int]) -> float:
        own = [v for i, v in enumerate(values) if all(int(keys[key][i]) == number for key, number in of.items())]
        return math.fsum(own) / len(own)

    def clip(value: float, bound: float | None) -> float:
        assert bound is not None
        return max(-bound, min(bound, value))

    found = []
    for i, value in enumerate(values):
        trajectory, version, engine = (int(keys[key][i]) for key in ("trajectory", "version", "engine"))
        if method == "off":
            found.append(1.0)
        elif method == "token":
            found.append(min(math.exp(value), 2.0))
        elif method == "icepop":
            found.append(math.exp(value) if 0.5 <= math.exp(value) <= 5.0 else 0.0)
        elif method == "sequence":
            found.append(min(math.exp(mean({"trajectory": trajectory})), 2.0))
        elif method == "sequence-mask":
            found.append(float(0.5 <= math.exp(mean({"trajectory": trajectory})) <= 5.0))
        else:
            both, alone = mean({"trajectory": trajectory, "version": version}), mean({"version": version})
            a, b, c = clip(value - both, 0.4), clip(both - alone, 0.1), clip(alone, 0.15)
            masked = abs(both - alone) > 0.35 or abs(alone) > 0.2 or abs(mean({"engine": engine})) > 0.3
            found.append(0.0 if masked else math.exp(a + b + c))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_definition(method):
    for seed in range(3):
        y, keys = tokens(seed=seed)
        y[keys["trajectory"] == 2] -= 1.0  # one trajectory below `low`
        if seed == 1:
            y[keys["engine"] == 1] += 0.5
        found = importance_weights(y, method, keys=keys, counts=COUNTS, levels=BOUNDS)
        assert found.weights.dtype == torch.float64
        assert found.weights.tolist() == pytest.approx(oracle(y, keys, method), rel=1e-12)
        masked = [w == 0.0 for w in oracle(y, keys, method)]
        assert found.metrics["importance/masked_share"] == pytest.approx(sum(masked) / len(y))
        assert any(masked) == (method in ("icepop", "sequence-mask", "levels"))


def test_an_engine_masks_and_changes_nothing_else():
    y, keys = tokens(spread=0.05)
    y[keys["engine"] == 1] += 0.5
    wide = LevelBounds(*([50.0] * 5), mask_engine=0.3)
    found = importance_weights(y, "levels", keys=keys, counts=COUNTS, levels=wide).weights
    assert (found[keys["engine"] == 1] == 0.0).all()
    assert torch.allclose(found[keys["engine"] == 0], y[keys["engine"] == 0].exp(), rtol=1e-12)
    without = {key: ids for key, ids in keys.items() if key != "engine"}
    assert (importance_weights(y, "levels", keys=without, counts=COUNTS, levels=wide).weights > 0).all()


@pytest.mark.parametrize("method", ["token", "icepop", "levels"])
def test_wide_bounds_give_the_ratio(method):
    y, keys = tokens()
    found = importance_weights(y, method, cap=1e12, low=0.0, high=1e12, keys=keys, counts=COUNTS)
    assert torch.allclose(found.weights, y.exp(), rtol=1e-14)


def test_wide_bounds_give_the_mean_ratio_of_a_trajectory():
    y, keys = tokens()
    found = importance_weights(y, "sequence", cap=math.inf, keys=keys, counts=COUNTS).weights
    for trajectory in range(COUNTS["trajectory"]):
        own = keys["trajectory"] == trajectory
        assert torch.allclose(found[own], y[own].mean().exp(), rtol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_on_policy_every_weight_is_one(method):
    _, keys = tokens()
    assert (importance_weights(torch.zeros(120), method, keys=keys, counts=COUNTS).weights == 1.0).all()


LEVELS = [
    [["trajectory", "version"], ["trajectory"], ["prompt_group"], ["domain"]],
    [["trajectory", "version"], ["prompt_group", "version"], ["domain", "version"], ["version"]],
]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("method", METHODS)
def test_at_the_old_policy_the_gradient_is_m_w_a(levels, method):
    """The gates see no drift at x = 0, with levels by version as well: weights are a change of measure alone."""
    y, keys = tokens()
    m = torch.full((120,), 1.0 / 120, dtype=torch.float64)
    advantages = torch.randn(120, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = importance_weights(y, method, keys=keys, counts=COUNTS).weights
    budgets = {"+".join(level): (0.2, 0.15) for level in levels}
    objective = build_objective("fiberpo", levels=levels, budgets=budgets, kernels=False)
    x = torch.zeros(120, dtype=torch.float64)
    used = {key: keys[key] for key in objective.keys}
    out = objective(x, advantages, m * w, keys=used, counts=COUNTS)
    assert torch.equal(out.gradient, m * w * advantages)


def on_ranks(y: Tensor, keys: dict[str, Tensor], method: str, parts: list[Tensor]):
    collective = Collective(len(parts))

    def call(rank: int):
        own = parts[rank]
        return importance_weights(
            y[own],
            method,
            keys={key: ids[own] for key, ids in keys.items()},
            counts=COUNTS,
            levels=BOUNDS,
            reduce=collective.reduce_of(rank),
        )

    with ThreadPoolExecutor(len(parts)) as pool:
        return [future.result() for future in [pool.submit(call, rank) for rank in range(len(parts))]], collective


@pytest.mark.parametrize("method", METHODS)
def test_order_and_ranks_change_no_bit(method):
    """Trajectories are cut through the middle: a context-parallel rank has a part of each. Values of many magnitudes,
    so that sums in float64 would depend on the order."""
    y, keys = tokens()
    y = y * torch.logspace(-12, 0, len(y), dtype=torch.float64)[torch.randperm(len(y))]
    one = importance_weights(y, method, keys=keys, counts=COUNTS, levels=BOUNDS)
    for size in (1, 2, 5):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(size))
        parts = list(order.chunk(size)) + [order[:0]]  # the last rank has no token
        found, collective = on_ranks(y, keys, method, parts)
        weights = torch.zeros_like(one.weights)
        for own, out in zip(parts, found):
            weights[own] = out.weights
            assert out.metrics == pytest.approx(one.metrics) and out.metrics == found[0].metrics
            assert out.kept is not None and one.kept is not None and torch.equal(out.kept, one.kept)
        assert torch.equal(weights, one.weights)
        assert set(collective.calls) == {1 if method in ("off", "token", "icepop") else 2}


def test_metrics_by_lag_and_engine():
    y = torch.tensor([0.0, math.log(4.0), -math.log(4.0), 0.0])
    keys = {"version": torch.tensor([0, 1, 1, 2]), "engine": torch.tensor([0, 0, 1, 1])}
    keys["trajectory"] = torch.tensor([0, 0, 0, 2])
    labels = {"version": torch.tensor([-1, 3, 0]), "engine": torch.tensor([2, 5])}
    counts = {"version": 3, "engine": 2, "trajectory": 3}
    found = importance_weights(y, "icepop", keys=keys, counts=counts, labels=labels)
    assert found.weights.tolist() == pytest.approx([1.0, 4.0, 0.0, 1.0])
    assert found.kept is not None and found.kept.tolist() == [2, 0, 1]
    wanted = {
        "": (6 / 4, 1 / 4, 36 / (4 * 18)),
        "/lag/unknown": (1.0, 0.0, 1.0),
        "/lag/0": (1.0, 0.0, 1.0),
        "/lag/3": (2.0, 0.5, 16 / (2 * 16)),
        "/engine/2": (2.5, 0.0, 25 / (2 * 17)),
        "/engine/5": (0.5, 0.5, 1 / 2),
    }
    names = ("weight", "masked_share", "effective_sample_size")
    assert found.metrics == pytest.approx(
        {f"importance/{name}{end}": value for end, row in wanted.items() for name, value in zip(names, row)}
    )


def test_masked_tokens_have_weight_zero_and_stay_in_the_means():
    y, keys = tokens()
    masked = keys["engine"] == 1
    plain = importance_weights(y, "sequence", keys=keys, counts=COUNTS).weights
    found = importance_weights(y, "sequence", keys=keys, counts=COUNTS, masked=masked)
    assert torch.equal(found.weights, plain.masked_fill(masked, 0.0))
    nothing = importance_weights(y, "token", keys=keys, counts=COUNTS, masked=torch.ones_like(masked))
    assert (nothing.weights == 0.0).all() and nothing.kept is not None and not nothing.kept.any()
    assert nothing.metrics["importance/masked_share"] == 1.0
    assert nothing.metrics["importance/weight"] == nothing.metrics["importance/effective_sample_size"] == 0.0


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("tis", {}, "importance method is 'tis'; choose one of off, token"),
        ("token", {"cap": 0.5}, "cap is 0.5; .* at least 1"),
        ("icepop", {"low": 1.5}, "low is 1.5 and high is 5.0; .* choose 0 <= low <= 1 <= high"),
        ("sequence", {}, r"'sequence' takes means by keys\['trajectory'\], which is missing"),
        ("levels", {"keys": {"trajectory": torch.zeros(2).long()}}, r"keys\['version'\], which is missing"),
        (
            "sequence",
            {"keys": {"trajectory": torch.zeros(2).long()}, "reduce": lambda x: x},
            r"counts\['trajectory'\] is missing; ranks that share sums",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(method, options, words):
    with pytest.raises(ValueError, match=words):
        importance_weights(torch.zeros(2), method, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_rank_refuses_a_value_that_is_not_finite(method, value):
    _, keys = tokens()
    keys = {key: ids[:2] for key, ids in keys.items()}
    y = torch.tensor([0.0, value])
    collective, errors = Collective(2), [None, None]

    def call(rank: int) -> None:
        own = slice(rank, rank + 1)
        mine = {key: ids[own] for key, ids in keys.items()}
        try:
            importance_weights(y[own], method, keys=mine, counts=COUNTS, reduce=collective.reduce_of(rank))
        except ValueError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors[0] == errors[1] and errors[0] is not None and "1 tokens have a log pi_old - log mu" in errors[0]
