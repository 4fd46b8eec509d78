"""The keys by which objectives group tokens, each against a plain loop over the tokens."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.trainer.batch import SUPPLIED_KEYS, mini_batches, token_keys, token_labels
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.trainer.states import state_ids
from fiberpo_megatron.types import RolloutBatch, concatenated_response_tokens
from tests.trainer.toy import SingleLayout

DOMAINS = 3


def batch(seed: int) -> RolloutBatch:
    """Groups of one to three trajectories of several turns, with versions and engines that change inside a turn."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, 9)
    mask = rng.random(lengths.sum()) < 0.6
    ends = np.cumsum(lengths)
    mask[ends - lengths] = False  # a prompt of one token
    mask[ends - 1] = True
    return RolloutBatch.filled(
        tokens=rng.integers(0, 50, lengths.sum()),
        response_mask=mask,
        lengths=lengths,
        groups=[0, 0, 1, 2, 2, 2, 3, 4, 4],
        domains=np.array([2, 2, 0, 2, 2, 2, 1, 0, 0]),
        weight_versions=np.where(mask, rng.choice([-1, 7, 8, 11], lengths.sum()), -1),
        engines=np.where(mask, rng.integers(0, 4, lengths.sum()), -1),
    )


def plain_ids(rollouts: RolloutBatch, first: int, last: int) -> dict[str, dict[int, Any]]:
    """What each response token of the trajectories [first, last) belongs to, by flat index, counted in a loop."""
    found: dict[str, dict[int, Any]] = {name: {} for name in SUPPLIED_KEYS if name != "state"}
    turn = -1
    position = 0
    for trajectory, length in enumerate(rollouts.lengths.tolist()):
        inside = False
        for _ in range(length):
            sampled = bool(rollouts.response_mask[position])
            if first <= trajectory < last:
                turn += sampled and not inside
                if sampled:
                    found["turn"][position] = turn
                    found["trajectory"][position] = trajectory
                    found["prompt_group"][position] = int(rollouts.groups[trajectory])
                    found["domain"][position] = int(rollouts.domains[trajectory])
                    found["version"][position] = int(rollouts.weight_versions[position])
                    found["engine"][position] = int(rollouts.engines[position])
            inside = sampled
            position += 1
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("first", "last"), [(0, 9), (0, 2), (2, 3), (3, 7), (7, 9)])
def test_keys_are_those_of_a_loop_over_the_tokens(seed, first, last):
    rollouts = batch(seed)
    keys, wanted = token_keys(rollouts, first, last, DOMAINS), plain_ids(rollouts, first, last)
    assert keys.keys() == wanted.keys() == set(SUPPLIED_KEYS) - {"state"}
    for name, (ids, count) in keys.items():
        values = wanted[name]
        mine = {position: int(ids[position]) for position in values}
        assert ids.dtype == np.int64 and all(0 <= found < count for found in mine.values()), name
        if name == "domain":  # numbered by the config, so that budgets of a domain stay its own
            assert mine == values and count == DOMAINS
            continue
        assert len(set(mine.values())) == count == len(set(values.values())), name
        pairs = set(zip(values.values(), mine.values()))
        assert len(pairs) == count, f"{name}: ids and values must correspond one to one"
        assert [found for _, found in sorted(pairs)] == list(range(count)), f"{name}: ids follow the order of values"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("first", "last"), [(0, 9), (2, 3), (3, 7)])
def test_labels_are_the_numbers_by_which_budgets_name_ids(seed, first, last):
    """The place of a turn, how far a version lies behind the trainer's 8 (11 is none of this run), and an engine."""
    rollouts = batch(seed)
    keys, labels = token_keys(rollouts, first, last, DOMAINS), token_labels(rollouts, first, last, 8)
    wanted = plain_ids(rollouts, first, last)
    begins = {}
    for position, turn in wanted["turn"].items():
        begins.setdefault(wanted["trajectory"][position], turn)
    lags = {-1: -1, 7: 1, 8: 0, 11: -1}
    for position in wanted["turn"]:
        found = {name: int(labels[name][keys[name][0][position]]) for name in labels}
        assert found == {
            "turn": wanted["turn"][position] - begins[wanted["trajectory"][position]],
            "version": lags[wanted["version"][position]],
            "engine": wanted["engine"][position],
        }
    assert {name: len(label) for name, label in labels.items()} == {name: keys[name][1] for name in labels}


def alike(seed: int) -> RolloutBatch:
    """Trajectories over two letters with prompts of one or two tokens, so that many states occur more than once."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, 24)
    prompts = rng.integers(1, 3, 24)
    mask = np.concatenate(
        [np.r_[np.zeros(p, bool), True, rng.random(n - p - 1) < 0.8] for p, n in zip(prompts, lengths)]
    )
    return RolloutBatch.filled(
        tokens=rng.integers(0, 2, lengths.sum()),
        response_mask=mask,
        lengths=lengths,
        groups=np.repeat(np.arange(8), 3),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("first", "last"), [(0, 24), (3, 12), (6, 7)])
def test_states_are_equal_prompts_with_equal_tokens_after_them(seed, first, last):
    rollouts = alike(seed)
    ids, count = state_ids(rollouts, first, last)
    tokens_of: dict[tuple[int, bytes], list[int]] = {}
    for trajectory in range(first, last):
        begin = int(rollouts.offsets[trajectory])
        mask = rollouts.response_mask[begin : begin + int(rollouts.lengths[trajectory])]
        prompt = mask.tolist().index(True)
        for at in np.flatnonzero(mask):
            # (length of the prompt, everything before the token): "1 | 0" and "1 0 |" are two states
            state = (prompt, rollouts.tokens[begin : begin + at].tobytes())
            tokens_of.setdefault(state, []).append(begin + int(at))
    repeated = [tokens for tokens in tokens_of.values() if len(tokens) > 1]
    assert count == len(repeated) and (last - first < 2 or count > 3)
    assert sorted({int(ids[tokens[0]]) for tokens in repeated}) == list(range(count))
    assert all(len(set(ids[tokens].tolist())) == 1 for tokens in repeated)
    known = [token for tokens in repeated for token in tokens]
    assert (np.delete(ids, known) == -1).all(), "states that were sampled once, prompts and other mini-batches"


def test_a_mini_batch_has_states_where_they_are_asked_for():
    rollouts = alike(0)
    common = {
        "batch": BatchConfig(prompts=8, mini_batches=2, micro_batch_tokens=32),
        "weighting": "token-mean",
        "domains": 1,
        "layout": SingleLayout(),
        "version": 0,
    }
    advantages = np.zeros(len(rollouts.lengths), np.float32)
    for part, first, last in zip(mini_batches(rollouts, advantages, **common, states=True), (0, 12), (12, 24)):
        ids, count = state_ids(rollouts, first, last)
        tokens = concatenated_response_tokens(part.micro_batches)
        assert part.keys["state"].tolist() == ids[tokens.numpy()].tolist() and part.counts["state"] == count > 0
    assert "state" not in mini_batches(rollouts, advantages, **common)[0].keys


def test_a_mini_batch_has_the_keys_of_its_tokens():
    rollouts = batch(0)
    advantages = np.zeros(len(rollouts.lengths), np.float32)
    parts = mini_batches(
        rollouts,
        advantages,
        batch=BatchConfig(prompts=2, mini_batches=2, micro_batch_tokens=32),
        weighting="seq-mean",
        domains=DOMAINS,
        layout=SingleLayout(),
        version=8,
    )
    edges = [0, 3, 9]  # groups 0 and 1, then 2 to 4
    for part, first, last in zip(parts, edges[:-1], edges[1:]):
        tokens = concatenated_response_tokens(part.micro_batches).tolist()
        for name, (ids, count) in token_keys(rollouts, first, last, DOMAINS).items():
            assert part.keys[name].tolist() == [int(ids[token]) for token in tokens] and part.counts[name] == count
        labels = token_labels(rollouts, first, last, 8)
        assert {name: label.tolist() for name, label in part.labels.items()} == {
            name: label.tolist() for name, label in labels.items()
        }
        assert sorted(tokens) == sorted(plain_ids(rollouts, first, last)["turn"])


def test_keys_of_a_ranks_tokens_take_the_memory_of_a_mini_batch():
    """A rank of a large run has few of the batch's tokens, and a batch of 64M tokens would not fit many times."""
    lengths = np.full(4096, 256)
    mask = np.arange(lengths.sum()) % 256 >= 64
    rollouts = RolloutBatch.filled(
        tokens=np.zeros(lengths.sum(), np.int64), response_mask=mask, lengths=lengths, groups=np.arange(4096) // 8
    )
    tokens = np.flatnonzero(mask[: 256 * 64])
    tracemalloc.start()
    keys = token_keys(rollouts, 0, 512, DOMAINS, tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(len(ids) == len(tokens) for ids, _ in keys.values())
    assert peak < 24 * 512 * 256, "three numbers for each token of the mini-batch"
