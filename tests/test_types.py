"""Batches of trajectories: made of groups, filled with what is declared, joined from shares."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron import types
from fiberpo_megatron.environments import Task
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.rollout import dump
from fiberpo_megatron.types import (
    TRAJECTORY,
    Branch,
    Completion,
    Prompt,
    RolloutBatch,
    RolloutGroup,
    Trajectory,
    WeightSpan,
    batch_of,
    flatten,
    join_batches,
    named_arrays,
)


def prompt(index: int, *tokens: int, domain: int = 0) -> Prompt:
    return Prompt(index, domain, tokens, f"p{index}", Task(f"p{index}"))


def completion(*tokens: int, reason: str = "stop", version: str = "3", **more: Any) -> Completion:
    log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return Completion(tokens, log_probs, reason, (WeightSpan(version, 0, len(tokens)),), **more)


PLAIN = Trajectory(prompt(0, 5, 6), completion(7, 8, 9, version="12"), "a", 0.5, True, {"format": 1.0})
TURNS = Trajectory(
    prompt(0, 5, 6),
    completion(
        7,
        8,
        9,
        1,
        reason="length",
        loss_mask=np.array([True, False, False, True]),
        engines=np.array([1, -1, -1, 2], np.int16),
    ),
    "b",
    -1.0,
    False,
    {"length": 2.0},
    {"calls": 3.0},
)
TURNS = replace(
    TURNS, completion=replace(TURNS.completion, weight_spans=(WeightSpan("3", 0, 1), WeightSpan("checkpoint", 3, 4)))
)
FAILED = Trajectory(prompt(4, 2, domain=1), completion(3), "c", 0.0, False, failure="died: it ended its process")
GROUPS = [RolloutGroup(PLAIN.prompt, (PLAIN, TURNS)), RolloutGroup(FAILED.prompt, (FAILED,))]


def assert_same(one: RolloutBatch, other: RolloutBatch) -> None:
    left, right = named_arrays(one), named_arrays(other)
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def test_groups_become_flat_arrays():
    batch = flatten(GROUPS)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 1, 2, 3]
    assert batch.response_mask.astype(int).tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1]
    assert batch.rollout_log_probs.tolist() == [0, 0, -1, -2, -3, 0, 0, -1, -2, -3, -4, 0, -1]
    assert batch.weight_versions.tolist() == [-1, -1, 12, 12, 12, -1, -1, 3, -1, -1, -1, -1, 3]
    assert batch.engines.tolist() == [-1, -1, 0, 0, 0, -1, -1, 1, -1, -1, 2, -1, 0]
    assert batch.lengths.tolist() == [5, 6, 2] and batch.groups.tolist() == [0, 0, 1]
    assert batch.rewards.tolist() == [0.5, -1.0, 0.0] and batch.correct.tolist() == [True, False, False]
    assert batch.domains.tolist() == [0, 0, 1]
    assert batch.truncated.tolist() == [False, True, False] and batch.failed.tolist() == [False, False, True]
    np.testing.assert_array_equal(batch.reward_parts["format"], np.float32([1, np.nan, np.nan]))
    np.testing.assert_array_equal(batch.reward_parts["length"], np.float32([np.nan, 2, np.nan]))
    np.testing.assert_array_equal(batch.environment_metrics["calls"], np.float32([np.nan, 3, np.nan]))
    assert batch.routed_experts.shape == (0, 0, 0)
    assert batch.response_lengths.tolist() == [3, 2, 1] and batch.turns.tolist() == [1, 2, 1]
    assert np.flatnonzero(batch.turn_begins).tolist() == [2, 7, 10, 12]


def test_every_array_has_the_type_that_it_declares():
    for batch in (
        flatten(GROUPS),
        flatten([]),
        RolloutBatch.filled(tokens=[1], response_mask=[1], lengths=[1], groups=[0]),
    ):
        for fact in fields(RolloutBatch):
            value = getattr(batch, fact.name)
            for array in value.values() if isinstance(value, dict) else [value]:
                assert array.dtype == fact.metadata["dtype"], fact.name


def test_experts_of_a_trajectory_lack_its_last_token():
    experts = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2)
    with_experts = replace(PLAIN, completion=replace(PLAIN.completion, routed_experts=experts))
    batch = flatten([RolloutGroup(PLAIN.prompt, (with_experts, with_experts))])
    np.testing.assert_array_equal(batch.routed_experts, np.concatenate([experts, experts]))
    assert batch.held_rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and batch.routing_rows.tolist() == list(range(10))
    joined = join_batches([batch, flatten(GROUPS[:0]), batch])
    assert joined.held_rows.tolist() == [*batch.held_rows, *(batch.held_rows + 10)] and len(joined.routed_experts) == 16
    second = batch.select(np.array([False, True]))
    assert second.routing_rows.tolist() == list(range(5, 10)) and second.held_rows is batch.held_rows
    assert batch.part(1, 2).routing_rows.tolist() == list(range(5, 10)) and not len(batch.without_held().held_rows)


@pytest.mark.parametrize(("rows", "words"), [(None, "token 0 has no"), (3, "token 3 has no"), (5, "1 routes have no")])
def test_a_token_without_a_route_is_named(rows: int | None, words: str):
    def with_routes(count: int | None) -> Trajectory:
        experts = None if count is None else np.zeros((count, 2, 2), np.uint8)
        return replace(PLAIN, completion=replace(PLAIN.completion, routed_experts=experts))

    with pytest.raises(ValueError, match=rf"sequence 1 of 2 has 5 tokens and \d routes, so that {words}"):
        flatten([RolloutGroup(PLAIN.prompt, (with_routes(4), with_routes(rows)))])


def test_a_group_without_trajectories_gets_no_number():
    """All of its trajectories were dropped; the numbers of the others stay dense, on which mini-batches rely."""
    batch = flatten([RolloutGroup(prompt(9), ()), GROUPS[0], RolloutGroup(prompt(8), ()), GROUPS[1]])
    assert_same(batch, flatten(GROUPS))
    assert len(flatten([RolloutGroup(prompt(9), ())]).lengths) == 0


def test_what_is_not_given_gets_its_declared_value():
    batch = RolloutBatch.filled(tokens=[1, 2, 3], response_mask=[0, 1, 1], lengths=[3], groups=[0], rewards=[1])
    assert batch.response_mask.tolist() == [False, True, True] and batch.rewards.tolist() == [1.0]
    assert batch.rollout_log_probs.tolist() == [0.0] * 3
    assert batch.weight_versions.tolist() == batch.engines.tolist() == [-1] * 3
    assert not batch.correct.any() and not batch.truncated.any() and not batch.failed.any()
    assert batch.domains.tolist() == [0] and batch.reward_parts == batch.environment_metrics == {}
    assert batch.routed_experts.shape == (0, 0, 0)


@pytest.mark.parametrize("missing", ["tokens", "lengths"])
def test_sizes_must_be_given(missing):
    arrays = {"tokens": [1], "response_mask": [1], "lengths": [1], "groups": [0]}
    with pytest.raises(KeyError, match=missing):
        RolloutBatch.filled(**{name: value for name, value in arrays.items() if name != missing})


def test_arrays_by_name_are_the_batch_again():
    batch = flatten(GROUPS)
    arrays = named_arrays(batch)
    assert {"tokens", "reward_parts/format", "environment_metrics/calls"} < arrays.keys()
    assert_same(batch_of(arrays), batch)
    slashed = replace(batch, reward_parts={"a/b": batch.rewards})
    assert batch_of(named_arrays(slashed)).reward_parts.keys() == {"a/b"}


def test_shares_are_joined_in_order_and_groups_renumbered():
    first, second = flatten(GROUPS[:1]), flatten(GROUPS[1:])
    assert_same(join_batches([first, second]), flatten(GROUPS))
    assert_same(join_batches([flatten([]), first, flatten([]), second, flatten([])]), flatten(GROUPS))
    assert_same(join_batches([flatten([]), flatten([])]), flatten([]))
    sparse = replace(flatten(GROUPS), groups=np.array([2, 2, 7]))
    assert join_batches([sparse, sparse]).groups.tolist() == [0, 0, 1, 2, 2, 3]


def test_names_that_a_share_lacks_are_unknown_there():
    joined = join_batches([flatten(GROUPS[1:]), flatten(GROUPS[:1])])
    np.testing.assert_array_equal(joined.reward_parts["format"], np.float32([np.nan, 1, np.nan]))
    np.testing.assert_array_equal(joined.environment_metrics["calls"], np.float32([np.nan, np.nan, 3]))


def test_one_more_fact_is_one_edit(monkeypatch, tmp_path):
    """A line in RolloutBatch alone; flattening, joining, exchange between ranks and the files on disk read it there."""

    @dataclass(frozen=True)
    class WithCharacters(RolloutBatch):
        characters: Any = types._array(np.int32, TRAJECTORY, -1, lambda trajectory: len(trajectory.text))

    for module in (types, dump):
        monkeypatch.setattr(module, "RolloutBatch", WithCharacters)
    first, second = (types.flatten([group]) for group in GROUPS)
    joined = types.join_batches([exchange.decode(exchange.encode(share)) for share in (first, second)])
    assert joined.characters.tolist() == [1, 1, 1] and joined.characters.dtype == np.int32
    folder = dump.RolloutDump(tmp_path)
    folder.write(joined, dump.Origin(0, "0", "", {}, ""))
    assert folder.read(0).characters.tolist() == [1, 1, 1]
    monkeypatch.undo()
    folder.write(flatten(GROUPS), dump.Origin(1, "1", "", {}, ""))  # a file from before the edit
    for module in (types, dump):
        monkeypatch.setattr(module, "RolloutBatch", WithCharacters)
    assert folder.read(1).characters.tolist() == [-1, -1, -1]


BRANCHED = replace(
    TURNS,
    branches=(
        Branch((5, 6, 7), completion(4, version="2", engines=np.array([3], np.int16))),
        Branch((9,), completion(2, 1, 3, reason="length", loss_mask=np.array([False, True, True]))),
    ),
)
WITH_BRANCHES = [RolloutGroup(PLAIN.prompt, (PLAIN, BRANCHED)), RolloutGroup(FAILED.prompt, (FAILED,))]


def test_branches_are_sequences_with_the_facts_of_their_trajectory():
    batch = flatten(WITH_BRANCHES)
    assert batch.lengths.tolist() == [5, 6, 4, 4, 2] and batch.trajectories.tolist() == [0, 1, 1, 1, 2]
    assert batch.tokens[11:19].tolist() == [5, 6, 7, 4, 9, 2, 1, 3] and batch.sequences.tolist() == [1, 3, 1]
    assert batch.response_mask[11:19].astype(int).tolist() == [0, 0, 0, 1, 0, 0, 1, 1]
    assert batch.engines[11:19].tolist() == [-1, -1, -1, 3, -1, -1, 0, 0]
    assert batch.weight_versions[11:16].tolist() == [-1, -1, -1, 2, -1]
    assert batch.rewards.tolist() == [0.5, -1, -1, -1, 0] and batch.groups.tolist() == [0, 0, 0, 0, 1]
    assert batch.truncated.tolist() == [False, True, True, True, False]
    np.testing.assert_array_equal(batch.reward_parts["length"], np.float32([np.nan, 2, 2, 2, np.nan]))
    whole = batch.per_trajectory()
    assert whole.lengths.tolist() == [5, 14, 2] and whole.response_lengths.tolist() == [3, 5, 1]
    assert whole.turns.tolist() == [1, 4, 1] and whole.rewards.tolist() == [0.5, -1, 0]
    np.testing.assert_array_equal(whole.reward_parts["length"], np.float32([np.nan, 2, np.nan]))
    assert whole.tokens is batch.tokens and flatten(GROUPS).trajectories.tolist() == [0, 1, 2]
    without = flatten(GROUPS)
    assert without.per_trajectory() is without


def test_a_trajectory_is_truncated_where_one_of_its_branches_is():
    cut = replace(PLAIN, branches=(Branch((1,), completion(2, reason="length")),))
    assert flatten([RolloutGroup(PLAIN.prompt, (cut, PLAIN))]).truncated.tolist() == [True, True, False]


def test_branches_are_cut_thinned_out_joined_and_sent():
    batch = flatten(WITH_BRANCHES)
    assert_same(batch_of(named_arrays(batch)), batch)
    assert_same(exchange.decode(exchange.encode(batch)), batch)
    assert_same(join_batches([flatten(WITH_BRANCHES[:1]), flatten([]), flatten(WITH_BRANCHES[1:])]), batch)
    part = batch.part(1, 5)
    assert part.trajectories.tolist() == [1, 1, 1, 2] and part.sequences.tolist() == [3, 1]
    assert part.per_trajectory().lengths.tolist() == [14, 2]
    left = batch.select(np.array([False, True, True, True, True]))
    assert left.trajectories.tolist() == [0, 0, 0, 1] and left.groups.tolist() == [0, 0, 0, 1]
    arrays = {name: array for name, array in named_arrays(flatten(GROUPS)).items() if name != "trajectories"}
    assert_same(batch_of(arrays), flatten(GROUPS))  # a file of an earlier version


@pytest.mark.parametrize(("prompt_ids", "mask"), [((), [True]), ((1, 2), [False])])
def test_a_branch_that_trains_nothing_is_refused(prompt_ids, mask):
    sampled = completion(3, loss_mask=np.array(mask))
    with pytest.raises(ValueError, match="at least one of each: leave out a branch"):
        Branch(prompt_ids, sampled)
