"""What a rank holds falls with more ranks: states, the peak of a step, routes, and what a checkpoint takes."""

import argparse

import pytest

from tools.rank_memory import SIZES, fullest, measure_ranks

SMALL = argparse.Namespace(**{**vars(SIZES), "layers": 2, "experts": 4, "row_tokens": 128})


def compare(few: int, many: int, sizes: argparse.Namespace) -> None:
    one, other = fullest(measure_ranks(few, sizes)), fullest(measure_ranks(many, sizes))
    share = few / many
    # parameters (2 bytes) and gradients (4) stay whole on each replica, master weights and moments (12) are shared
    assert other["states"] < one["states"] * (6 + 12 * share / few) / (6 + 12 / few) * 1.05
    assert other["step"] < one["step"]
    assert other["routes"] == pytest.approx(share * one["routes"])
    assert other["background"] < one["background"] * (2 + 12 * share / few) / (2 + 12 / few) * 1.05
    # a synchronous save goes through one tensor at a time: the largest, the embedding's float32 master weight, is
    # alive with its bytes and the next one
    largest = sizes.vocabulary * sizes.hidden * 4 / 2**10
    assert max(one["saving"], other["saving"]) < 3.3 * largest


def test_two_ranks_hold_less_than_one():
    compare(1, 2, SMALL)


@pytest.mark.exhaustive
def test_four_ranks_hold_less_than_two():
    compare(2, 4, SIZES)
