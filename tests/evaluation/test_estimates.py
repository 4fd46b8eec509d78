"""Estimators against enumeration of all draws, and intervals against simulated sets."""

import random
from itertools import combinations, product
from math import sqrt

import pytest

from fiberpo_megatron.evaluation.estimates import clustered, majority, pass_at


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(n: int):
    for correct in range(n + 1):
        samples = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            assert pass_at(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Averaged over all outcomes of n draws with probability p it is 1 - (1 - p)^k: the sum is exact."""
    p, n, k = 0.3, 5, 3
    mean = 0.0
    for draws in product([True, False], repeat=n):
        correct = sum(draws)
        mean += p**correct * (1 - p) ** (n - correct) * pass_at(n, correct, k)
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(2, 1, 3), (2, 3, 1), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(n: int, correct: int, k: int):
    with pytest.raises(ValueError, match=rf"pass@{k} of {correct} right ones among {n} samples"):
        pass_at(n, correct, k)


def test_the_majority_votes_and_ties_are_drawn_fairly():
    assert majority(["4", "5", "4"], [True, False, True]) == 1.0
    assert majority(["4", "5", "5"], [True, False, False]) == 0.0
    assert majority(["4", "5"], [True, False]) == 0.5
    assert majority(["4", "5", "6"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority(["", "", "4"], [False, False, True]) == 1.0, "an empty answer abstains"
    assert majority(["", ""], [False, False]) == 0.0
    assert majority(["4", "4"], [True, False]) == 0.5, "equal answers that were scored differently"


@pytest.mark.parametrize(("prompts", "samples", "spread"), [(30, 1, 0.0), (30, 8, 0.3), (100, 4, 0.35), (12, 4, 0.2)])
def test_intervals_cover_the_true_mean(prompts: int, samples: int, spread: float):
    """Prompts have solve rates of their own around 0.3. With 600 sets the share of intervals that cover the mean has a
    standard error of 0.9 points, so that 92 % is more than 3 of them below 95 %."""
    draw, covered, mean = random.Random(prompts * 100 + samples), 0, 0.5
    for _ in range(600):
        values = []
        for _ in range(prompts):
            rate = mean + spread * draw.choice([-1, 1])
            values.append(sum(draw.random() < rate for _ in range(samples)) / samples)
        estimate = clustered(values)
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= mean <= estimate.high
    assert covered / 600 >= 0.92


def test_intervals_stay_inside_and_have_a_width():
    nothing, everything = clustered([0.0] * 20), clustered([1.0] * 20)
    assert (nothing.value, nothing.low) == (0.0, 0.0) and 0.1 < (nothing.high or 0) < 0.25
    assert (everything.value, everything.high) == (1.0, 1.0) and 0.75 < (everything.low or 0) < 0.9
    assert clustered([0.5]).low is None
    with pytest.raises(ValueError, match="at least one"):
        clustered([])


def test_samples_of_one_prompt_do_not_count_as_independent():
    """Ten prompts that are always or never solved say as much with 100 samples each as with one."""
    values = [1.0] * 5 + [0.0] * 5
    estimate = clustered(values)
    assert (estimate.high or 0) - (estimate.low or 0) > 1.9 * sqrt(0.25 / 10) / (1 + 3.84 / 10)
