"""ParallelLayout: exchanges, reductions, agreement, and who is who."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import collect_ranks, run_ranks
from fiberpo_megatron.mcore.parallel.layout import start_layout, stop_layout
from fiberpo_megatron.types import RolloutBatch
from tests.distributed.parity import QWEN3_MOE, make_config


def share_of(data_rank: int) -> RolloutBatch:
    """Two groups on the first replica, one on the second; lengths differ."""
    groups = np.array([0, 0, 1]) if data_rank == 0 else np.array([7, 7])
    lengths = np.arange(2, 2 + len(groups)) + data_rank
    total, count = int(lengths.sum()), len(groups)
    return RolloutBatch.filled(
        tokens=np.arange(total) + 100 * data_rank,
        response_mask=np.arange(total) % 2 == 0,
        rollout_log_probs=np.linspace(-1, 0, total, dtype=np.float32),
        lengths=lengths,
        rewards=np.full(count, data_rank + 0.5, dtype=np.float32),
        correct=np.full(count, data_rank == 1),
        groups=groups,
        domains=np.full(count, data_rank),
        truncated=np.zeros(count, dtype=bool),
        weight_versions=np.arange(total) + 7,
        engines=np.arange(total) % 3,
        failed=np.full(count, data_rank == 0),
        reward_parts={"form": np.full(count, data_rank + 0.25)} | ({"late": np.ones(count)} if data_rank else {}),
    )


def use_layout(parallel: dict[str, int]) -> dict[str, Any]:
    config = make_config(parallel=parallel)
    start_layout(QWEN3_MOE, config.parallel, config.run).barrier()
    stop_layout()
    layout = start_layout(
        QWEN3_MOE, config.parallel, config.run
    )  # in the launcher's store, which keeps the first's keys
    layout.barrier()
    x = torch.tensor([float(layout.data_rank * 10 + layout.context_rank)], dtype=torch.float64)
    joined = layout.gather_rollouts(share_of(layout.data_rank) if layout.is_leader else None)
    return {
        "rank": layout.rank,
        "place": (layout.data_rank, layout.context_rank),
        "flags": (layout.is_leader, layout.is_last_stage, layout.is_logger),
        "sum": layout.sum_over_tokens(x).item(),
        "max": layout.max_over_tokens(x).item(),
        "untouched": x.item() == layout.data_rank * 10 + layout.context_rank,
        "text": layout.share_text("grüße" if layout.rank == 0 else None),
        "empty": layout.share_text("" if layout.rank == 0 else None),
        "gathered": layout.gather_json({"rank": layout.rank, "text": "ü" * layout.rank}),
        "at_root": layout.gather_json({"rank": layout.rank}, root_only=True),
        "any": [layout.any_rank(layout.rank == rank) for rank in range(layout.world_size)] + [layout.any_rank(False)],
        "joined": joined,
        "multiple": layout.sequence_multiple,
    }


@pytest.mark.parametrize(
    "parallel, multiple",
    [
        ({"tensor": 2, "data": 2}, 2),
        ({"pipeline": 2, "data": 2}, 1),
        ({"context": 2, "data": 2}, 4),
        ({"data": 2, "expert": 2}, 1),
    ],
)
def test_exchanges(parallel: dict[str, int], multiple: int):
    world_size = 2 if "expert" in parallel else 4
    found = run_ranks(world_size, use_layout, parallel)
    shares = [share_of(0), share_of(1)]
    for answer in found:
        joined = answer["joined"]
        np.testing.assert_array_equal(joined.tokens, np.concatenate([s.tokens for s in shares]))
        np.testing.assert_array_equal(joined.groups, [0, 0, 1, 2, 2])
        for name in (
            "rewards",
            "rollout_log_probs",
            "correct",
            "response_mask",
            "weight_versions",
            "engines",
            "failed",
        ):
            np.testing.assert_array_equal(getattr(joined, name), np.concatenate([getattr(s, name) for s in shares]))
        parts = {name: values.tolist() for name, values in joined.reward_parts.items()}
        assert parts == {"form": [0.25] * 3 + [1.25] * 2, "late": pytest.approx([np.nan] * 3 + [1.0] * 2, nan_ok=True)}
        assert answer["text"] == "grüße" and answer["empty"] == ""
        assert answer["gathered"] == [{"rank": rank, "text": "ü" * rank} for rank in range(world_size)]
        at_root = [{"rank": rank} for rank in range(world_size)]
        assert answer["at_root"] == (at_root if answer is found[0] else [])
        assert answer["any"] == [True] * world_size + [False]
        assert answer["untouched"] and answer["multiple"] == multiple
        places = {other["place"] for other in found}
        assert answer["sum"] == sum(10 * data + context for data, context in places)
        assert answer["max"] == max(10 * data + context for data, context in places)
    flags = [answer["flags"] for answer in found]
    assert sum(leader for leader, _, _ in flags) == 2
    assert sum(logger for _, _, logger in flags) == 1
    assert all(last for _, last, logger in flags if logger)


def disagree(failing: int, quiet: bool) -> None:
    config = make_config()
    layout = start_layout(QWEN3_MOE, config.parallel, config.run)
    mine = layout.rank == failing
    layout.agree(None, "nothing")
    layout.agree("the disk is full" if mine else None, "saving", reraise=not (mine and quiet))


def test_agree_raises_everywhere():
    outcomes = collect_ranks(2, disagree, 1, False)
    assert [outcome.error for outcome in outcomes] == ["RuntimeError: saving failed on rank 1: the disk is full"] * 2


def test_agree_without_reraise():
    first, second = collect_ranks(2, disagree, 1, True)
    assert first.error == "RuntimeError: saving failed on rank 1: the disk is full"
    assert second.error is None


def leave_waiting() -> None:
    config = make_config(run={"distributed_timeout_s": 2.0})
    layout = start_layout(QWEN3_MOE, config.parallel, config.run)
    if layout.rank == 0:
        layout.barrier()
    else:
        time.sleep(8)


def test_waiting_is_bounded():
    first, _ = collect_ranks(2, leave_waiting, timeout_s=30)
    assert first.error is not None and "still running" not in first.error
