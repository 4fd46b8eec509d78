"""The shards that ranks hold, put together, are the full tensors, in every layout and family."""

from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.policy import build_policy
from tests.distributed.parity import MODELS, make_config
from tests.planning.layouts import next_layout

LAYOUTS: list[dict[str, int]] = [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {}]
Shard = tuple[str, Any, tuple[int, ...], tuple[int, ...]]


LIMIT = 100_000
Share = list[list[tuple[str, Any]]]


def weights(model: str) -> list[tuple[list[Shard], dict[str, Any], int, Share, list[Any]]]:
    """Return for each layout this rank's shards, the full tensors (on rank 0), how many shards are views, this rank's
    share of the full tensors, and what every rank's share was announced to be."""
    found = []
    for parallel in LAYOUTS:
        if "expert" in parallel and "dense" in model:
            continue
        config = make_config(parallel=parallel)
        policy = build_policy(config, MODELS[model], next_layout(MODELS[model], config))
        memory = {p.untyped_storage().data_ptr() for chunk in policy.models for p in chunk.parameters()}
        shards = list(policy.weights.local())
        views = sum(shard.tensor.untyped_storage().data_ptr() in memory for shard in shards)
        local = [(s.name, s.tensor.numpy().copy(), s.shape, s.offset) for s in shards]
        full = {name: tensor.numpy() for name, tensor in policy.weights.full()}
        share = [[(name, tensor.numpy()) for name, tensor in mine] for mine in policy.weights.share(LIMIT)]
        announced = [[[(one.name, one.shape) for one in of] for of in ranks] for ranks in policy.weights.rounds(LIMIT)]
        found.append((local, full, views, share, announced))
    return found


@pytest.mark.parametrize("model", list(MODELS))
def test_shards_of_all_ranks_make_the_full_tensors(model: str) -> None:
    ranks = run_ranks(2, weights, model)
    for layout in range(len(ranks[0])):
        full = ranks[0][layout][1]
        covered = {name: np.zeros(tensor.shape, bool) for name, tensor in full.items()}
        for rank in ranks:
            shards, _, views, _, _ = rank[layout]
            for name, values, shape, offset in shards:
                assert shape == full[name].shape, name
                at = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
                np.testing.assert_array_equal(full[name][at], values, err_msg=name)
                covered[name][at] = True
            assert views > 0, "parameters that Megatron stores as the files do are not copied"
        assert full and all(seen.all() for seen in covered.values())
        shares = [rank[layout][3] for rank in ranks]
        for number, announced in enumerate(ranks[0][layout][4]):
            assert announced == [[(name, values.shape) for name, values in share[number]] for share in shares]
        assert ranks[0][layout][4] == ranks[1][layout][4] and len(shares[0]) > 1
        every = [[tensor for mine in share for tensor in mine] for share in shares]
        assert sorted(name for mine in every for name, _ in mine) == sorted(full), "each tensor falls to one rank"
        for name, values in (tensor for mine in every for tensor in mine):
            np.testing.assert_array_equal(full[name], values, err_msg=name)
        sizes = [sum(values.size for _, values in mine) for mine in every]
        if layout != 1:  # a pipeline stage's tensors cannot go elsewhere
            assert max(sizes) < 0.7 * sum(sizes), sizes
    if model == "moe":
        tensor, pipeline, expert, data = (sum(values.size for _, values, _, _ in found[0]) for found in ranks[1])
        assert max(pipeline, expert) < 0.8 * data and tensor < data, "a rank yields its own part alone"
