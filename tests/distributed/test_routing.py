"""Recorded routes: the same tokens have the same experts on every layout, and replay uses them."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from fiberpo_megatron.trainer.step_routing import partition_share
from fiberpo_megatron.types import MicroBatch, concatenated_response_tokens
from tests.distributed.parity import (
    QWEN3_MOE,
    TEMPERATURE,
    fixed_gate,
    make_batch,
    make_config,
    micro_batches_for,
)

LAYERS, TOP_K, EXPERTS = 4, 2, 8
FULL = {"recompute": "full"}
SELECTIVE = {"recompute": "selective", "recompute_modules": ["moe"]}
"""The router is computed again, but not the layer that knows the micro-batch; pipelines have several in flight."""


BINS = 3
"""Sets of tokens whose agreement is counted apart."""


def start(parallel: dict[str, int], budget: int, **model: Any) -> tuple[MegatronPolicy, list[MicroBatch]]:
    config = make_config(parallel=parallel, model=model, algorithm={"routing_replay": "old"})
    layout = start_layout(QWEN3_MOE, config.parallel, config.run)
    return build_policy(config, QWEN3_MOE, layout), micro_batches_for(make_batch(), layout, budget)


def record(parallel: dict[str, int], recompute: dict[str, Any]) -> dict[str, Any]:
    """Counts of this rank's response tokens, agreement with a shifted record, and replay of foreign routes."""
    policy, batches = start(parallel, 72, **recompute)
    tokens = len(make_batch().tokens)
    policy.log_probs(batches, TEMPERATURE, routing="record")
    counts = policy.routing.expert_counts(batches)
    index = concatenated_response_tokens(batches)

    fill(policy, batches, foreign_routes(tokens))
    differing = policy.routing.agreement(batches, torch.arange(tokens) % BINS, BINS)
    replayed = policy.routing.expert_counts(batches)
    steps = [policy.step(batches, fixed_gate(batches, tokens), TEMPERATURE) for _ in range(2)]
    return {
        "counts": dict(zip(index.tolist(), counts.int().tolist())),
        "replayed": dict(zip(index.tolist(), replayed.int().tolist())),
        "norms": [step.gradient_norm for step in steps],
        "agreement": differing.tolist(),
        "held": policy.routing.host_bytes,
    }


def fill(policy: MegatronPolicy, batches: list[MicroBatch], routes: NDArray[np.int32]) -> None:
    """Give the policy its part of the routes [all tokens, all layers, top_k]; -1 is unknown."""
    tokens = policy.routing.tokens(batches)
    experts = torch.from_numpy(routes)[tokens][:, policy.routing.layers]
    known = (experts >= 0).all(-1).all(-1)
    policy.routing.fill(tokens[known], experts[known], replay=True)


def foreign_routes(tokens: int) -> NDArray[np.int32]:
    """Routes that the model itself would not choose: random pairs of different experts."""
    rng = np.random.default_rng(5)
    return rng.permuted(np.tile(np.arange(EXPERTS), (tokens, LAYERS, 1)), axis=-1)[..., :TOP_K].astype(np.int32)


def join(found: list[dict[str, Any]], name: str) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for answer in found:
        for token, row in answer[name].items():
            assert out.setdefault(token, row) == row
    return out


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(1, record, {}, {})[0]


@pytest.mark.parametrize(
    "parallel, recompute",
    [
        ({"tensor": 2}, FULL),
        pytest.param({"pipeline": 2}, FULL, marks=pytest.mark.exhaustive),
        pytest.param({"pipeline": 2}, SELECTIVE, marks=pytest.mark.exhaustive),
        ({"context": 2}, {}),
        ({"data": 2, "expert": 2}, {}),
        ({"pipeline": 2, "virtual_pipeline": 2}, SELECTIVE),
    ],
    ids=str,
)
def test_every_layout_records_and_replays_the_same(
    alone: dict[str, Any], parallel: dict[str, int], recompute: dict[str, Any]
):
    found = run_ranks(2, record, parallel, recompute)
    assert join(found, "counts") == alone["counts"]
    assert join(found, "replayed") == alone["replayed"]
    for answer in found:
        assert answer["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert answer["agreement"] == alone["agreement"]
        # each rank holds its own rows and layers, in a byte each; rows of padding differ between layouts
        assert answer["held"] < 0.7 * alone["held"] and alone["held"] < 2.5 * LAYERS * TOP_K * len(make_batch().tokens)


def test_counts_and_agreement(alone: dict[str, Any]):
    foreign = foreign_routes(len(make_batch().tokens))
    for token, row in alone["replayed"].items():
        wanted = np.bincount(foreign[token - 1].ravel(), minlength=EXPERTS)  # of the position that predicts it
        assert row == wanted.tolist()
    assert all(sum(row) == LAYERS * TOP_K for row in alone["counts"].values())
    batch = make_batch()
    routed = np.setdiff1d(np.arange(len(batch.tokens)), batch.offsets[1:] - 1)  # the last of a sequence is not read
    for layer in alone["agreement"]:
        assert [compared for _, compared in layer] == np.bincount(routed % BINS).tolist()
        assert all(same < 0.5 * compared for same, compared in layer) and sum(same for same, _ in layer) > 0


def replay_changes_the_step() -> tuple[list[float], str, str]:
    """Norms with own, with foreign and with own recorded routes; errors of tokens and shapes without a route."""
    policy, batches = start({}, 400)
    tokens = len(make_batch().tokens)
    gate = fixed_gate(batches, tokens)

    def norm() -> float:
        policy.accumulate(batches, gate, TEMPERATURE)
        return sum(float(p.main_grad.square().sum()) for p in policy.models[0].parameters())

    policy.log_probs(batches, TEMPERATURE, routing="record")
    norms = [norm()]
    fill(policy, batches, foreign_routes(tokens))
    norms.append(norm())
    policy.routing.clear()
    policy.log_probs(batches, TEMPERATURE, routing="record")
    norms.append(norm())
    partial = foreign_routes(tokens)
    partial[10] = -1
    fill(policy, batches, partial)
    errors = []
    known = policy.routing.tokens(batches)
    for action in (norm, lambda: policy.routing.fill(known, torch.zeros(len(known), 1, TOP_K), replay=True)):
        try:
            action()
            errors.append("nothing")
        except ValueError as error:
            errors.append(str(error))
    return norms, errors[0], errors[1]


def test_replay_is_used_and_fails_loudly():
    ((norms, missing, shape),) = run_ranks(1, replay_changes_the_step)
    assert norms[0] == norms[2] != norms[1]
    assert missing.startswith("routing replay failed on rank 0: 1 tokens have no recorded route, ")
    assert "the first is flat token 10" in missing
    assert "does not fit the model" in shape


def test_partition_share():
    counts = torch.tensor([[4.0, 0, 2, 2], [0, 0, 0, 8]])
    torch.testing.assert_close(partition_share(counts, 2), torch.tensor([[0.5, 0.5], [0, 1]], dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"expert_partitions = 3 does not divide the 4 experts; use one of \[1, 2, 4\]"
    ):
        partition_share(counts, 3)
