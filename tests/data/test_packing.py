import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.data.packing import (
    assign_rows,
    pack,
    packing_efficiency,
    padded_lengths,
    split_trajectories,
    zigzag,
)
from fiberpo_megatron.types import RolloutBatch


def rollout_batch(prompt_lengths: list[int], response_lengths: list[int]) -> RolloutBatch:
    mask = np.concatenate([[False] * p + [True] * r for p, r in zip(prompt_lengths, response_lengths)])
    count, total = len(prompt_lengths), len(mask)
    return RolloutBatch.filled(
        tokens=np.arange(1, total + 1),
        response_mask=mask.astype(bool),
        lengths=np.add(prompt_lengths, response_lengths),
        groups=np.arange(count),
    )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 50), min_size=0, max_size=60), st.integers(1, 5), st.integers(50, 120), st.integers(1, 4)
)
def test_every_trajectory_is_in_exactly_one_row_within_budget(sizes, data_size, budget, multiple_of):
    ranks = assign_rows(sizes, data_size, budget, multiple_of=multiple_of)
    assert ranks == assign_rows(sizes, data_size, budget, multiple_of=multiple_of)
    assert len(ranks) == data_size and len({len(rows) for rows in ranks}) == 1
    assert len(ranks[0]) % multiple_of == 0
    assert sorted(i for rows in ranks for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= budget for rows in ranks for row in rows)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 8))
def test_no_rank_has_more_than_the_mean_and_one_trajectory(sizes, data_size):
    """Graham's bound for any list scheduling: mean + (1 - 1/m) longest."""
    loads = [sum(sizes[i] for row in rows for i in row) for rows in assign_rows(sizes, data_size, 500)]
    assert max(loads) <= sum(sizes) / data_size + (1 - 1 / data_size) * max(sizes) + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 64), st.floats(0.2, 1.2))
def test_most_loaded_rank_is_within_five_percent_on_log_normal_lengths(seed, data_size, spread):
    lengths = np.random.default_rng(seed).lognormal(6.0, spread, 32 * data_size).astype(np.int64).clip(2, 8192)
    ranks = assign_rows(padded_lengths(lengths, 8), data_size, 8192)
    found = packing_efficiency(lengths, ranks, 8)
    assert found.imbalance <= 0.05
    assert found.useful_share > 0.95
    needed = padded_lengths(lengths, 8).sum() / (8192 * data_size)
    assert found.micro_batches <= np.ceil(needed) + 2


def test_a_multiple_of_micro_batches_splits_rows_instead_of_padding():
    ranks = assign_rows([4, 4, 4, 4, 4, 4], 1, 8, multiple_of=2)
    assert sorted(len(row) for row in ranks[0]) == [1, 1, 2, 2]


def test_efficiency_counts_padding_empty_rows_and_the_most_loaded_rank():
    lengths = np.array([5, 4])  # 4 inputs, and 3 padded to 4
    found = packing_efficiency(lengths, [[[0], [1]], [[], []]], 4)
    assert found.useful_share == 7 / 16  # each empty row is a padding sequence of 4
    assert found.imbalance == 0
    assert found.micro_batches == 2
    found = packing_efficiency(lengths, [[[0, 1]], [[]]], 4)
    assert found.useful_share == 7 / 12 and found.imbalance == pytest.approx(8 / 6 - 1)


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


@pytest.mark.parametrize(("data_size", "multiple_of"), [(1, 1), (2, 1), (3, 2)])
def test_branches_of_a_trajectory_share_a_row_where_they_fit(data_size, multiple_of):
    random = np.random.default_rng(0)
    sizes = random.integers(1, 40, 200)
    trajectories = np.sort(random.integers(0, 90, 200))
    totals = np.bincount(trajectories, sizes)
    ranks = assign_rows(sizes, data_size, 64, multiple_of=multiple_of, trajectories=trajectories)
    assert sorted(index for rows in ranks for row in rows for index in row) == list(range(200))
    rows_of = {number: set() for number in np.unique(trajectories).tolist()}
    for rank, rows in enumerate(ranks):
        assert len(rows) == len(ranks[0]) and len(rows) % multiple_of == 0
        for place, row in enumerate(rows):
            assert sizes[row].sum() <= 64 and row == sorted(row)
            for index in row:
                rows_of[int(trajectories[index])].add((rank, place))
    apart = [number for number, rows in rows_of.items() if len(rows) > 1]
    assert apart and all(totals[number] > 64 for number in apart)
    assert split_trajectories(ranks, trajectories) == len(apart)
    alone = assign_rows(sizes, data_size, 64, multiple_of=multiple_of)
    assert alone == assign_rows(sizes, data_size, 64, multiple_of=multiple_of, trajectories=np.arange(200))
    assert split_trajectories(alone, np.arange(200)) == 0


def test_a_sequence_that_is_too_long_names_its_trajectory():
    with pytest.raises(ValueError, match="trajectory 4 takes 90 positions"):
        assign_rows([10, 20, 90], 1, 64, trajectories=np.array([3, 4, 4]))
