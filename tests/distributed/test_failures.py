"""What goes wrong on one rank stops all of them, with a cause, before the weights move."""

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import build_policy
from fiberpo_megatron.mcore.router import correction_biases
from fiberpo_megatron.types import Coefficients, batch_of, named_arrays
from tests.distributed.parity import (
    DEEPSEEK_V3,
    QWEN3_MOE,
    TEMPERATURE,
    fixed_gate,
    make_batch,
    make_config,
    micro_batches_for,
)


def step_with(fault: str, parallel: dict[str, int], single_pass: bool) -> tuple[str, bool, float]:
    """(what the faulty step raised, whether the weights are untouched, gradient norm of the next, healthy step)"""
    config = make_config(parallel=parallel, model={"router_bias_update_rate": 0.01})
    layout = start_layout(DEEPSEEK_V3, config.parallel, config.run)
    batches = micro_batches_for(make_batch(), layout, 72)
    policy = build_policy(config, DEEPSEEK_V3, layout)
    gate = fixed_gate(batches, 200)
    weights = [*policy.models[0].parameters(), *correction_biases(policy.models)]
    before = [tensor.detach().clone() for tensor in weights]
    lone = layout.rank == layout.world_size - 1

    def faulty(log_probs: torch.Tensor, where: slice) -> Coefficients:
        good = gate(log_probs, where)
        if not lone:
            return good
        if fault == "raises":
            raise ValueError("levels do not nest")
        return Coefficients(good.gradient * float("nan"))

    try:
        policy.step(batches, faulty, TEMPERATURE, single_pass=single_pass)
        raised = "nothing"
    except (FloatingPointError, RuntimeError) as error:
        raised = f"{type(error).__name__}: {error}"
    same = all(torch.equal(a, b) for a, b in zip(before, weights))
    return raised, same, policy.step(batches, gate, TEMPERATURE).gradient_norm


@pytest.mark.parametrize("parallel", [{"data": 2}, {"pipeline": 2}], ids=str)
@pytest.mark.parametrize("single_pass", [False, True])
def test_coefficients_that_are_not_finite(parallel: dict[str, int], single_pass: bool):
    found = run_ranks(2, step_with, "nan", parallel, single_pass)
    for raised, same, norm in found:
        assert raised.startswith("FloatingPointError: the optimizer step (weights unchanged) failed on rank 1: ")
        assert raised.endswith("coefficients of the objective are not finite")
        assert same and np.isfinite(norm)


@pytest.mark.parametrize("single_pass", [False, True])
def test_an_objective_that_raises(single_pass: bool):
    for raised, same, norm in run_ranks(2, step_with, "raises", {"data": 2}, single_pass):
        assert raised == "RuntimeError: the objective failed on rank 1: ValueError: levels do not nest"
        assert same and np.isfinite(norm)


def idle_rank(parallel: dict[str, int]) -> tuple[int, float, list[int]]:
    """One trajectory for two data-parallel ranks: one of them has nothing but an empty row."""
    config = make_config(parallel=parallel)
    layout = start_layout(QWEN3_MOE, config.parallel, config.run)
    batch = make_batch()
    one = slice(0, int(batch.lengths[0]))
    arrays = {
        name: array[one if len(array) == len(batch.tokens) else slice(0, 1)]
        for name, array in named_arrays(batch).items()
        if len(array)  # the batch has no routing
    }
    small = batch_of(arrays)
    batches = micro_batches_for(small, layout, 72)
    policy = build_policy(config, QWEN3_MOE, layout)
    norms = [policy.step(batches, fixed_gate(batches, 3), TEMPERATURE).gradient_norm for _ in range(2)]
    return sum(len(b.response_tokens) for b in batches), norms[-1], [len(b.tokens) for b in batches]


@pytest.mark.parametrize("parallel", [{"data": 2}, {"data": 2, "expert": 2}], ids=str)
def test_a_rank_without_tokens_takes_part(parallel: dict[str, int]):
    found = run_ranks(2, idle_rank, parallel)
    assert sorted(tokens for tokens, _, _ in found)[0] == 0
    ((_, alone, _),) = run_ranks(1, idle_rank, {})
    assert [norm for _, norm, _ in found] == pytest.approx([alone, alone], rel=1e-5)
