from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.environments.shuffle import Permutation, derive_key


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers())
def test_every_element_comes_once(size, seed):
    permutation = Permutation(size, derive_key(seed))
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_known_values_on_every_machine():
    """These numbers decide the split of procedural tasks; a change would move problems between the sets."""
    permutation = Permutation(1000, derive_key("addition", 2))
    assert [permutation(i) for i in range(5)] == [972, 158, 721, 159, 383]


def test_a_huge_set_needs_no_memory():
    size = 10**12
    permutation = Permutation(size, derive_key(0))
    drawn = [permutation(i) for i in range(1000)]
    assert len(set(drawn)) == 1000
    assert 0.4 < sum(drawn) / len(drawn) / size < 0.6


def test_shuffles_of_other_keys_are_unrelated():
    """Expect each of 10 values 400 times as the first element over 4000 keys; the standard deviation is 19."""
    counts = Counter(Permutation(10, derive_key(seed))(0) for seed in range(4000))
    assert all(300 < counts[value] < 500 for value in range(10))


def test_positions_outside_are_refused():
    permutation = Permutation(5, derive_key(0))
    for position in (-1, 5):
        with pytest.raises(IndexError):
            permutation(position)
