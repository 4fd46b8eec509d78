import math

import pytest

from fiberpo_megatron.telemetry.metrics import METRICS, combine, describe, format_value


@pytest.mark.parametrize(
    ("name", "unit", "reduction"),
    [
        ("reward/mean", "", "mean"),
        ("accuracy/addition", "share", "mean"),
        ("ratio/max", "", "max"),
        ("token/count", "tokens", "sum"),
        ("token/clip_share", "share", "mean"),
        ("gate/trajectory/plus/pass", "share", "mean"),
        ("gate/domain+global/regime/both_zeroed", "share", "mean"),
        ("gate/trajectory/s_plus/mean", "", "mean"),
        ("gate/trajectory/s_minus/p99", "", "max"),
        ("gate/trajectory/base_weight/mean", "", "mean"),
        ("gate/time_share", "share", "mean"),
        ("seconds/generate", "s", "sum"),
        ("learning_rate", "", "last"),
        ("gradient_norm_max", "", "max"),
        ("gpu/3/power", "W", "mean"),
        ("reward/format/mean", "", "mean"),
        ("failed_share", "share", "mean"),
        ("environment/calls/mean", "", "mean"),
        ("environment/sums/failures", "", "sum"),
    ],
)
def test_names_find_their_metric(name, unit, reduction):
    assert describe(name) in METRICS
    assert (describe(name).unit, describe(name).reduction) == (unit, reduction)


def test_unknown_names_are_kept_and_averaged():
    assert describe("mine/own") not in METRICS and describe("mine/own").title == "mine/own"
    assert combine([{"mine/own": 1}, {"mine/own": 2}]) == {"mine/own": 1.5}


def test_combine_follows_each_reduction():
    records = [
        {"entropy": 1.0, "ratio/max": 3.0, "seconds/train": 1.0, "learning_rate": 5.0},
        {"entropy": 2.0, "ratio/max": 2.0, "seconds/train": 2.0, "learning_rate": 4.0, "loss": 7.0},
    ]
    assert combine(records) == {
        "entropy": 1.5,
        "ratio/max": 3.0,
        "seconds/train": 3.0,
        "learning_rate": 4.0,
        "loss": 7.0,
    }
    assert combine([]) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_never_hidden(bad):
    assert math.isnan(combine([{"ratio/max": 1.0}, {"ratio/max": bad}, {"ratio/max": 2.0}])["ratio/max"])


def test_values_are_short():
    assert format_value("accuracy", 0.4567) == "45.7 %"
    assert format_value("tokens_per_second", 12345.6) == "12346 tokens/s"
    assert format_value("gradient_norm", 0.123456) == "0.123"
    assert format_value("entropy", math.nan) == "nan nats"


def test_an_earlier_pattern_never_hides_a_later_one():
    for number, metric in enumerate(METRICS):
        name = metric.pattern.replace("*", "x")
        first = next(m for m in METRICS if m is describe(name))
        assert METRICS.index(first) == number, f"{metric.pattern} is hidden by {first.pattern}"
