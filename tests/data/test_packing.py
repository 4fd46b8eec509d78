import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.data.packing import assign_rows, pack, padded_lengths, zigzag
from fiberpo_megatron.types import RolloutBatch


def rollout_batch(prompt_lengths: list[int], response_lengths: list[int]) -> RolloutBatch:
    mask = np.concatenate([[False] * p + [True] * r for p, r in zip(prompt_lengths, response_lengths)])
    count, total = len(prompt_lengths), len(mask)
    return RolloutBatch(
        tokens=np.arange(1, total + 1),
        response_mask=mask.astype(bool),
        rollout_log_probs=np.zeros(total, np.float32),
        lengths=np.add(prompt_lengths, response_lengths).astype(np.int64),
        rewards=np.zeros(count, np.float32),
        correct=np.zeros(count, bool),
        groups=np.arange(count),
        domains=np.zeros(count, np.int64),
        truncated=np.zeros(count, bool),
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=0, max_size=60), st.integers(1, 5), st.integers(50, 120))
def test_every_trajectory_is_in_exactly_one_row_within_budget(sizes, data_size, budget):
    ranks = assign_rows(sizes, data_size, budget)
    assert len(ranks) == data_size and len({len(rows) for rows in ranks}) == 1
    assert sorted(i for rows in ranks for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= budget for rows in ranks for row in rows)


def test_most_loaded_rank_is_within_five_percent_on_log_normal_lengths():
    for seed in range(5):
        sizes = np.random.default_rng(seed).lognormal(6.0, 1.0, 512).astype(int).clip(2, 8192)
        loads = [sum(int(sizes[i]) for row in rows for i in row) for rows in assign_rows(sizes, 16, 8192)]
        assert max(loads) <= 1.05 * np.mean(loads)


def test_oversized_is_an_error_naming_the_fix_or_its_own_row():
    with pytest.raises(ValueError, match=r"trajectory 1 takes 90 positions.*at least 90"):
        assign_rows([10, 90], 1, 64)
    rows = assign_rows([10, 90, 20], 1, 64, oversized="own_micro_batch")[0]
    assert [1] in rows


def test_pack_labels_and_response_tokens():
    batch = rollout_batch([2, 3], [2, 1])  # tokens 1..4 and 5..8
    (row,) = pack(batch, [[0, 1]], sequence_multiple=4)
    assert row.tokens.tolist() == [1, 2, 3, 0, 5, 6, 7, 0]
    assert row.labels.tolist() == [2, 3, 4, 0, 6, 7, 8, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert row.response_positions.tolist() == [1, 2, 6]
    assert row.response_tokens.tolist() == [2, 3, 7]  # flat indices of the labels
    assert row.cu_seqlens.tolist() == [0, 4, 8] and row.max_seqlen == 4


def test_empty_row_is_padding_without_response_tokens():
    (row,) = pack(rollout_batch([2], [2]), [[]], sequence_multiple=4)
    assert row.tokens.tolist() == [0] * 4 and len(row.response_tokens) == 0


@pytest.mark.parametrize("context_size", [1, 2, 4])
def test_context_ranks_partition_the_response_tokens(context_size):
    batch = rollout_batch([2, 5, 1], [9, 3, 20])
    parts = [
        pack(batch, [[0, 2], [1]], sequence_multiple=8, context_rank=r, context_size=context_size)
        for r in range(context_size)
    ]
    found = torch.cat([m.response_tokens for part in parts for m in part]).sort().values
    assert found.tolist() == np.flatnonzero(batch.response_mask).tolist()
    for part in parts:
        for row in part:
            assert torch.equal(row.labels[row.response_positions], torch.tensor(batch.tokens)[row.response_tokens])


def test_zigzag_balances_causal_work():
    work = [sum(p + 1 for p in zigzag(16, r, 4)) for r in range(4)]
    assert len(set(work)) == 1


def test_padded_lengths_drop_the_last_token():
    assert padded_lengths(np.array([2, 5, 6]), 4).tolist() == [4, 4, 8]
