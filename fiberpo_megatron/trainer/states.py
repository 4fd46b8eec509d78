"""This module finds the samples of equal states: tokens that were drawn after the same prompt and the same tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.fibration.tokens import LONE
from fiberpo_megatron.types import RolloutBatch


def state_ids(rollouts: RolloutBatch, first: int, last: int) -> tuple[NDArray[np.int64], int]:
    """Return the id of the state of every token [N], and the number of ids, among the sequences [first, last).

    A state is the prompt of a trajectory and all that follows it before the token (arXiv:2603.08239, definition 3.2);
    what an environment said between two turns belongs to it. A branch that goes on from another sequence's prompt has
    that prompt. States with at least two sampled tokens have the ids 0, 1, ...; all other tokens have LONE = -1. Every
    rank finds the same ids, because all hold the same rollouts.
    """
    ids = np.full(len(rollouts.tokens), LONE, dtype=np.int64)
    count = 0
    begins = rollouts.offsets[first:last]
    ends = begins + rollouts.lengths[first:last]
    at = begins + _prompt_lengths(rollouts, first, last)
    prefix = _numbered([rollouts.tokens[begin:start].tobytes() for begin, start in zip(begins, at)])
    while True:
        # Trajectories whose prefixes up to here are equal have equal numbers; one that is alone stays alone.
        going = at < ends
        prefix, at, ends = prefix[going], at[going], ends[going]
        _, prefix, members = np.unique(prefix, return_inverse=True, return_counts=True)
        together = members[prefix] > 1
        prefix, at, ends = prefix[together], at[together], ends[together]
        if not len(at):
            return ids, count
        sampled = rollouts.response_mask[at]
        _, state, samples = np.unique(prefix[sampled], return_inverse=True, return_counts=True)
        repeated = samples > 1
        numbers = np.where(repeated, count + np.cumsum(repeated) - 1, LONE)
        ids[at[sampled]] = numbers[state]
        count += int(repeated.sum())
        _, token = np.unique(rollouts.tokens[at], return_inverse=True)
        prefix = prefix * (int(token.max()) + 1) + token
        at = at + 1


def _prompt_lengths(rollouts: RolloutBatch, first: int, last: int) -> NDArray[np.int64]:
    """Return the tokens of each sequence's prompt: of the shortest prompt in its trajectory with which its own one
    begins."""
    begins, trajectories = rollouts.offsets[first:last], rollouts.trajectories[first:last]
    ends = begins + rollouts.lengths[first:last]
    own = np.array([_before_response(rollouts.response_mask[a:b]) for a, b in zip(begins, ends)], dtype=np.int64)
    prompts = [rollouts.tokens[begin : begin + size] for begin, size in zip(begins, own)]
    found = own.copy()
    numbers, counts = np.unique(trajectories, return_counts=True)
    for number, count in zip(numbers[counts > 1], counts[counts > 1]):
        begin = int(np.searchsorted(trajectories, number))
        members = range(begin, begin + int(count))
        shortest_first = sorted(members, key=own.__getitem__)
        for one in members:
            found[one] = next(own[o] for o in shortest_first if np.array_equal(prompts[o], prompts[one][: own[o]]))
    return found


def _before_response(response_mask: NDArray[np.bool_]) -> int:
    return int(response_mask.argmax()) if response_mask.any() else len(response_mask)


def _numbered(values: Sequence[bytes]) -> NDArray[np.int64]:
    """Equal values get equal numbers."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
