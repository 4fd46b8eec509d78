"""The engines' routes reach the ranks that route the tokens, and no others; they are the same in every layout."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.types import RolloutBatch
from tests.distributed.parity import QWEN3_MOE, make_batch, make_config, micro_batches_for

LAYERS, TOP_K = 4, 2


def experts_of(rows: np.ndarray, kind: str) -> np.ndarray:
    """What the engine says of tokens, by their number."""
    found = (rows[:, None, None] * 7 + np.arange(LAYERS)[:, None] * 3 + np.arange(TOP_K)) % (8 if kind == "u1" else 300)
    return found.astype(kind)


def share_of(data: int, size: int, kind: str) -> RolloutBatch:
    """A leader's share of the batch's groups, with routes of all but each sequence's last token."""
    whole = make_batch()
    groups = whole.groups % size == data
    share = whole.select(groups)
    tokens = len(share.tokens)
    rows = np.setdiff1d(np.arange(tokens), share.offsets[1:] - 1)
    return replace(
        share,
        routing_rows=np.arange(tokens, dtype=np.int32),
        held_rows=rows,
        routed_experts=np.zeros((len(rows), LAYERS, TOP_K), kind),
    )


def collected(parallel: dict[str, int], kind: str, thin: bool) -> dict[str, Any]:
    """Gather the batch, and collect the routes of this rank's share of the packed rows and of two of the layers."""
    config = make_config(parallel=parallel)
    layout = start_layout(QWEN3_MOE, config.parallel, config.run)
    share = share_of(layout.data_rank, layout.data_size, kind) if layout.is_leader else None
    joined = layout.gather_rollouts(share)
    if layout.is_leader:
        joined = replace(joined, routed_experts=experts_of(joined.held_rows, kind))
    assert (len(joined.held_rows) > 0) == layout.is_leader
    batch = joined.select(np.arange(len(joined.lengths)) % 3 > 0) if thin else joined
    sources = torch.cat([row.source_tokens for row in micro_batches_for(batch, layout, 72)])
    tokens = sources[sources >= 0]
    layers = [1, 3] if layout.pipeline_rank else [0, 2]
    known, experts = layout.routes(batch, tokens, layers)
    last = torch.zeros(len(batch.tokens), dtype=torch.bool)
    last[torch.from_numpy(batch.offsets[1:] - 1)] = True
    assert torch.equal(known, ~last[tokens])
    wanted = experts_of(batch.routing_rows[tokens[known].numpy()].astype(np.int64), kind)[:, layers]
    nothing = layout.routes(joined.without_held(), tokens, layers)
    return {
        "equal": np.array_equal(experts.numpy(), wanted) and experts.numpy().dtype == np.dtype(kind),
        "tokens": len(tokens),
        "bytes": experts.numpy().nbytes,
        "held": joined.routed_experts.nbytes,
        "unknown": bool(nothing[0].any()),
    }


@pytest.mark.parametrize(
    ("parallel", "ranks", "kind", "thin"),
    [
        ({"data": 2, "pipeline": 2}, 4, "u1", True),
        pytest.param({"data": 2, "context": 2}, 4, "i2", False, marks=pytest.mark.exhaustive),
        pytest.param({"data": 4}, 4, "u1", False, marks=pytest.mark.exhaustive),
    ],
)
def test_each_rank_gets_its_own_tokens_and_layers(parallel: dict[str, int], ranks: int, kind: str, thin: bool):
    found = run_ranks(ranks, collected, parallel, kind, thin)
    whole = sum(answer["held"] for answer in found)
    for answer in found:
        assert answer["equal"] and not answer["unknown"]
        assert answer["bytes"] < whole / 2, "a rank has a part of what the engines returned"
    assert sum(answer["held"] > 0 for answer in found) == parallel["data"], "leaders alone hold what they generated"
