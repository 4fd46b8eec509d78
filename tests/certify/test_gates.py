"""Orders, cuts and micro-batches of the gates: what is equal to the bit, and defects that must be found."""

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.batch import draw_problem, made_batches, steady
from fiberpo_megatron.certify.checks import Check
from fiberpo_megatron.certify.compare import difference, metric_difference
from fiberpo_megatron.certify.gates import check_gates, cuts, orders
from fiberpo_megatron.certify.ranks import Sum, in_order, run_ranks
from fiberpo_megatron.fibration import OBJECTIVES, Objective, build_objective
from fiberpo_megatron.trainer.step_file import Tokens
from tests.certify import planted
from tests.variations import varied


def tokens(seed: int = 3, **shape: int) -> Tokens:
    shape = {"groups": 4, "samples": 3, "longest": 7, "domains": 2, "partitions": 3} | shape
    return draw_problem(np.random.default_rng(seed), **shape).tokens("seq-mean")


def broken(objective: Objective, batch: Tokens | None = None) -> dict[str, Check]:
    return {check.what: check for check in check_gates(objective, batch or tokens(), "a batch", 0) if not check.passed}


@pytest.mark.parametrize("objective", varied(OBJECTIVES, ("fiberpo", "apc", "cispo")))
def test_results_do_not_depend_on_order_cut_or_micro_batches(objective: str):
    assert not broken(build_objective(objective))


def test_one_bit_of_one_coefficient_in_a_cut_is_found():
    found = broken(planted.OneBit())
    assert set(found) == {what for what, _ in cuts(tokens(), 0)}
    check = found["3 ranks, of which one holds all tokens"]
    assert check.found["gradient"].differing == 1
    assert check.found["gradient"].relative < 1e-6
    assert check.found["gated_ratio"].equal
    assert check.where is not None and check.where.startswith("gradient of token ")


def test_a_reduction_in_float32_is_found():
    batch = tokens(groups=8, samples=4, longest=30)
    try:
        found = broken(planted.Float32Reduction(), batch)
    except (ValueError, RuntimeError, OverflowError):
        return  # sums that are not those of any ranks may also be refused
    assert {"2 data- x 2 context-parallel ranks, zigzag chunks", "16 ranks, tokens at random"} <= set(found)


def test_a_mean_per_micro_batch_is_found():
    found = broken(planted.MeanPerMicroBatch())
    assert "micro-batches of 1 trajectories, without a reduction" in found
    assert "2 data-parallel ranks, whole trajectories" in found
    assert "tokens in reverse order" not in found or found["tokens in reverse order"].found["gradient"].relative < 1e-6
    assert found["micro-batches of 1 trajectories, without a reduction"].found["gradient"].relative > 0.1


def test_a_result_that_depends_on_the_order_is_found():
    found = broken(planted.OrderDependent())
    assert {what for what, _ in orders(tokens(), 0)} <= set(found)
    assert "the same call again" not in found


def test_every_order_and_cut_has_each_token_once():
    batch = tokens()
    every = list(range(len(batch)))
    for _, order in orders(batch, 1):
        assert sorted(order.tolist()) == every
    for what, parts in cuts(batch, 1):
        assert sorted(torch.cat(parts).tolist()) == every, what
    named = dict(cuts(batch, 1))
    chunks = named["1 data- x 2 context-parallel ranks, zigzag chunks"]
    long = int(torch.bincount(batch.keys["trajectory"]).argmax())
    places = (batch.keys["trajectory"] == long).nonzero()[:, 0]
    outer = [int(place) for place in places if place in chunks[0]]
    assert places[0] in outer and places[-1] in outer  # the first and the last chunk are on rank 0
    assert 0 < len(outer) < len(places)


@pytest.mark.parametrize("level", varied(["trajectory", "domain"], ["trajectory"]))
def test_the_made_batches_bring_the_gates_into_every_state(level: str):
    objective = build_objective({"trajectory": "fiberpo", "domain": "fiberpo-domain"}[level])
    batches, missing = made_batches(objective, 0, 2, 4)
    assert not missing
    reached = {state for batch in batches for state in batch.states}
    assert {f"gate/{level}/regime/{at}" for at in ("both_pass", "one_rollback", "one_zeroed", "both_zeroed")} < reached
    assert {"token/clipped", "token/free", "gate/trajectory/minus/rollback"} < reached
    extreme = batches[-1].tokens
    assert float(extreme.log_ratio.max()) == 79 and float(extreme.log_ratio.min()) == -85
    assert 0 < int((extreme.weights == 0).sum()) < len(extreme)
    again, _ = made_batches(objective, 0, 2, 4)
    assert all(torch.equal(one.tokens.log_ratio, two.tokens.log_ratio) for one, two in zip(batches, again))


def test_steady_log_ratios_are_away_from_the_kinks():
    objective = build_objective("ppo")
    problem = draw_problem(np.random.default_rng(0), groups=2, samples=2, longest=8, domains=1, partitions=1)
    at = np.flatnonzero(problem.rollouts.response_mask)
    problem.log_ratio[at] = np.log(1.2 if problem.advantages[0] > 0 else 0.8)  # on the clip bound of trajectory 0
    moved, by = steady(problem, objective, np.random.default_rng(1))
    assert by < 2e-6
    assert not np.array_equal(moved.log_ratio, problem.log_ratio)


def test_a_rank_that_fails_ends_the_others():
    batch = tokens()
    with pytest.raises(RuntimeError, match="there are no tokens here"):
        run_ranks(planted.RaisesInACut(), batch, [torch.arange(len(batch)), torch.arange(0)])


def test_ranks_that_reduce_different_sizes_are_refused():
    from concurrent.futures import ThreadPoolExecutor

    total = Sum(2)

    def rank_sum(rank: int) -> torch.Tensor:
        with total.turn:
            return total.of(rank)(torch.ones(rank + 1, dtype=torch.float64))

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(rank_sum, rank) for rank in range(2)]
        errors = [str(future.exception()) for future in futures]
    assert all("different sizes: [1, 2]" in error for error in errors)


def test_differences():
    wanted = torch.tensor([1.0, -2.0, 0.0])
    assert difference(wanted.clone(), wanted).equal
    found = difference(torch.tensor([1.0, -2.5, 0.0]), wanted)
    assert (found.differing, found.largest, found.relative, found.at) == (1, 0.5, 0.25, 1)
    assert found.within(0.25) and not found.within(0.2) and not found.within(None)
    zero = difference(torch.tensor([1.0, -2.0, -0.0]), wanted)
    assert (zero.differing, zero.largest, zero.at) == (1, 0.0, 2)
    assert not zero.within(None) and zero.within(0.0)
    assert difference(torch.tensor([1.0, float("nan"), 0.0]), wanted).largest == float("inf")
    nan = torch.tensor([float("nan")])
    assert difference(nan.clone(), nan).equal
    with pytest.raises(ValueError, match="compare results of the same tokens"):
        difference(wanted.double(), wanted)
    worst, name = metric_difference({"a": 1.0, "b": 2.0, "c": 3.3}, {"a": 1.0, "b": 2.2, "c": 3.0})
    assert name == "c" and worst.differing == 2
    with pytest.raises(ValueError, match="other names: \\['b'\\]"):
        metric_difference({"a": 1.0}, {"a": 1.0, "b": 1.0})
    order = torch.tensor([2, 0, 1])
    assert in_order([torch.tensor([5.0]), torch.tensor([6.0, 7.0])], order.split([1, 2])).tolist() == [6, 7, 5]
