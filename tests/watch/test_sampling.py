"""Thinned curves keep every peak, stay where they are, and have the means of what they stand for."""

from pathlib import Path

import numpy as np
import pytest

from fiberpo_megatron.watch.curves import Window, curve
from fiberpo_megatron.watch.following import FollowedRun
from fiberpo_megatron.watch.sampling import extremes, means, smoothed
from fiberpo_megatron.watch.table import Table

STEPS = np.arange(100_000)


@pytest.mark.parametrize("seed", range(3))
def test_no_peak_is_lost(seed: int):
    random = np.random.default_rng(seed)
    values = random.normal(size=STEPS.size)
    places = random.choice(STEPS.size, 20, replace=False)
    values[places] = np.where(np.arange(20) % 2, 100.0, -100.0) + np.arange(20)
    found = extremes(STEPS, values, 0, STEPS.size, 300)
    assert len(found.steps) <= 2 * 300 + 6
    assert {values.min(), values.max()} <= set(found.values.tolist())
    for place in places:  # no two of them share a bucket and a sign, or the larger one is there
        near = (found.steps > place - 512) & (found.steps < place + 512)
        sign = np.sign(values[place])
        assert (sign * found.values[near]).max() >= sign * values[place]
    assert (np.diff(found.steps) > 0).all()
    assert np.array_equal(values[found.steps], found.values)  # real points, at the steps where they are
    assert found.steps[0] == 0 and found.steps[-1] == STEPS[-1]


def test_points_stay_where_they_are_while_a_run_grows():
    values = np.random.default_rng(1).normal(size=STEPS.size)
    before = extremes(STEPS[:70_000], values[:70_000], 0, 70_000, 300)
    after = extremes(STEPS[:70_400], values[:70_400], 0, 70_400, 300)
    settled = before.steps < 69_000
    assert set(before.steps[settled]) == set(after.steps[after.steps < 69_000])


def test_few_points_are_all_there_with_their_gaps():
    values = np.array([1.0, np.nan, 3.0])
    for thin in (extremes, means):
        found = thin(STEPS[:3], values, 0, 3, 300)
        assert np.array_equal(found.values, values, equal_nan=True)


def test_gaps_of_a_thinned_curve():
    values = np.where((STEPS > 20_000) & (STEPS < 60_000), np.nan, 1.0)
    found = extremes(STEPS, values, 0, STEPS.size, 100)
    inside = (found.steps > 21_000) & (found.steps < 59_000)
    assert np.isnan(found.values[inside]).all() and inside.any()
    mean = means(STEPS, values, 0, STEPS.size, 100)
    assert np.isnan(mean.values[(mean.steps > 22_000) & (mean.steps < 58_000)]).all()


def test_means_and_moving_means_are_those_of_the_rows():
    values = np.random.default_rng(2).normal(size=4096)
    steps = np.arange(4096)
    found = means(steps, values, 0, 4096, 64)
    assert np.allclose(found.values, values.reshape(64, 64).mean(1))
    values[100:120] = np.nan
    moving = smoothed(steps, values, 0, 4096, 5000, 11)
    for place in (0, 3, 99, 110, 2000, 4095):
        window = values[max(0, place - 5) : place + 6]
        expected = np.nanmean(window) if not np.isnan(window).all() else np.nan
        assert moving.values[place] == pytest.approx(expected, nan_ok=True)
    part = smoothed(steps, values, 1000, 1100, 5000, 11)
    assert np.allclose(part.values, moving.values[1000:1100])  # a range sees the rows beside it
    thin = smoothed(steps, values, 0, 4096, 64, 11)
    assert np.allclose(thin.values, moving.values[thin.steps], equal_nan=True) and len(thin.steps) <= 66


@pytest.fixture
def run(tmp_path: Path) -> FollowedRun:
    run = FollowedRun(tmp_path)
    table = run.tables["train"] = Table()
    rows = [[step, 1.0, 0.25, step if step % 10 == 0 else None] for step in range(20_000)]
    table.extend(("x", "one", "quarter", "rare"), list(range(20_000)), rows)
    return run


def test_a_range_gets_more_detail_and_one_point_beyond_each_end(run: FollowedRun):
    whole = curve(run, {"kind": "train", "metric": "x"}, Window(points=200))
    part = curve(run, {"kind": "train", "metric": "x"}, Window(begin=501, end=600, points=200))
    assert whole is not None and whole["rows"] == 20_000 and len(whole["x"]) < 300
    assert part is not None and part["x"] == list(range(500, 602)) and part["y"] == list(range(499, 601))


def test_bands_and_differences(run: FollowedRun):
    found = curve(run, {"kind": "train", "metric": "one", "band": "quarter"}, Window(end=10))
    assert found is not None and set(found["low"]) == {0.75} and set(found["high"]) == {1.25}
    found = curve(run, {"kind": "train", "metric": "one", "minus": "quarter"}, Window(points=50, stack=True))
    assert found is not None and set(found["y"]) == {0.75}


def test_a_metric_of_some_steps_is_joined_in_lines_and_nothing_in_stacks(run: FollowedRun):
    lines = curve(run, {"kind": "train", "metric": "rare"}, Window(end=40))
    assert lines is not None and None not in lines["y"] and lines["y"][:4] == [0, 10, 20, 30]
    stack = curve(run, {"kind": "train", "metric": "rare"}, Window(end=20, stack=True))
    assert stack is not None and stack["y"][:12] == [0] * 10 + [10, 0]


def test_what_is_not_there(run: FollowedRun):
    assert curve(run, {"kind": "train", "metric": "nothing"}, Window()) is None
    assert curve(run, {"kind": "eval", "metric": "x"}, Window()) is None
    assert curve(run, {"kind": "train", "metric": "x"}, Window(begin=30_000, end=40_000)) is not None
