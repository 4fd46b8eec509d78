"""A healthy model in bfloat16 is not stopped for its rounding, and lost weights are still found."""

import pytest

from fiberpo_megatron.sources.publication_check import Tolerance
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig


def tolerance(exact: bool) -> Tolerance:
    return Tolerance(WeightSyncConfig(verify_tolerance=0.05), exact)


def test_float32_is_held_to_the_tolerance():
    exact = tolerance(True)
    assert exact.bound() == 0.05
    exact.measured(0.04, 1)
    assert exact.bound() == 0.05


def test_bfloat16_is_held_to_what_was_measured(capsys: pytest.CaptureFixture[str]):
    rounded = tolerance(False)
    assert rounded.bound() == 0.5, "weights that were lost differ by more"
    rounded.measured(None, 1)  # a rank that does not log
    rounded.measured(0.08, 1)
    said = capsys.readouterr().err
    assert "differ by 0.08" in said and "verify_tolerance = 0.05" in said
    assert rounded.bound() == pytest.approx(0.16)
    rounded.measured(0.07, 2)
    assert rounded.bound() == pytest.approx(0.14) and not capsys.readouterr().err
    rounded.measured(0.01, 3)
    assert rounded.bound() == 0.05, "never below what the settings allow"
