"""The keys by which objectives group tokens, each against a plain loop over the tokens."""

from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.trainer.batch import SUPPLIED_KEYS, mini_batches, token_keys
from fiberpo_megatron.trainer.settings import BatchConfig
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
    found: dict[str, dict[int, Any]] = {name: {} for name in SUPPLIED_KEYS}
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
                    found["weight_version"][position] = int(rollouts.weight_versions[position])
                    found["engine"][position] = int(rollouts.engines[position])
            inside = sampled
            position += 1
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("first", "last"), [(0, 9), (0, 2), (2, 3), (3, 7), (7, 9)])
def test_keys_are_those_of_a_loop_over_the_tokens(seed, first, last):
    rollouts = batch(seed)
    keys, wanted = token_keys(rollouts, first, last, DOMAINS), plain_ids(rollouts, first, last)
    assert keys.keys() == wanted.keys() == set(SUPPLIED_KEYS)
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
    )
    edges = [0, 3, 9]  # groups 0 and 1, then 2 to 4
    for part, first, last in zip(parts, edges[:-1], edges[1:]):
        tokens = concatenated_response_tokens(part.micro_batches).tolist()
        for name, (ids, count) in token_keys(rollouts, first, last, DOMAINS).items():
            assert part.keys[name].tolist() == [int(ids[token]) for token in tokens] and part.counts[name] == count
        assert sorted(tokens) == sorted(plain_ids(rollouts, first, last)["turn"])
