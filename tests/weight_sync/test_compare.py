import numpy as np
import pytest

from fiberpo_megatron.weight_sync.compare import WeightMismatch, compare_log_probs

OURS = np.array([-1.0, -2.0, -3.0, -4.0])


def compare(theirs, **options):
    return compare_log_probs(OURS, theirs, **({"tolerance": 0.1, "engine": "engine 1", "version": "8"} | options))


def test_the_mean_difference_is_returned():
    assert compare(OURS + [0.1, -0.1, 0.1, 0.0]) == pytest.approx(0.075)


def test_a_mismatch_has_both_figures():
    with pytest.raises(WeightMismatch) as raised:
        compare(OURS + [0.0, 0.0, 1.5, 0.1])
    message = str(raised.value)
    assert "weights '8', engine 1 and the trainer disagree" in message and "tolerance of the mean is 0.1" in message
    assert "mean |difference| 0.4, max 1.5 over 4 tokens" in message
    assert "at position 2 the trainer has -3.000000, the engine -1.500000" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_a_mismatch(bad):
    with pytest.raises(WeightMismatch, match=f"at position 1 the trainer has -2.000000, the engine {bad}"):
        compare([-1.0, bad, -3.0, -4.0])


def test_another_version_is_a_mismatch_even_with_equal_log_probs():
    with pytest.raises(WeightMismatch, match="engine 1 reports weights '7' after weights '8' were published"):
        compare(OURS, reported_version="7")
    compare(OURS, reported_version="8")


@pytest.mark.parametrize("theirs", [OURS[:3], OURS[None], []])
def test_shapes_must_fit(theirs):
    with pytest.raises(ValueError, match="shapes"):
        compare(theirs)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="shapes"):
        compare_log_probs([], [], tolerance=1.0, engine="it", version="0")
