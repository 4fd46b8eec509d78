"""The benchmark of a step runs in small sizes, and its last line has the ratios that the acceptance on a GPU reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {"layers": 1, "hidden": 32, "heads": 2, "vocabulary": 64, "rows": 1, "row-tokens": 32, "rounds": 1}


def bench(**sizes: int) -> subprocess.CompletedProcess[str]:
    words = [f"--{name.replace('_', '-')}={size}" for name, size in {**SMALL, "warm-up": 0, **sizes}.items()]
    command = [sys.executable, ROOT / "tools/bench_step.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_last_line_has_the_ratios_and_the_speeds(ranks: int):
    done = bench(ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for key in ("single_pass_ratio", "two_pass_ratio", "with_old_log_probs_ratio"):
        assert isinstance(found[key], float) and 0 < found[key] < 1000
    assert found["ranks"] == ranks and found["device"] == "cpu"
    speeds = found["tokens_per_second"]
    assert speeds.keys() == {"bare Megatron", "single pass", "two passes", "with old log-probs"}
    assert all(speeds.values())
    # the ratio is that of the times, which the speeds are made from
    assert found["two_pass_ratio"] == pytest.approx(speeds["bare Megatron"] / speeds["two passes"], rel=0.01)
    assert "where it goes on rank 0, ms" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_fails_is_an_error_without_ratios(ranks: int):
    done = bench(ranks=ranks, tensor=2 * ranks)  # more ranks than there are
    assert done.returncode not in (0, 2) and "ratio" not in done.stdout


@pytest.mark.exhaustive
def test_an_unknown_size_is_refused():
    assert bench(sizes=3).returncode == 2
