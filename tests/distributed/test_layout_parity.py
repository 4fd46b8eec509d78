"""The layout comparison as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/layout_parity.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(
    "arguments",
    [
        "--pipeline 2 --expert 2 --data 2 --objective fiberpo-expert --micro-batch-tokens 96",
        "--context 2 --objective fiberpo-domain --micro-batch-tokens 1",  # every trajectory a micro-batch of its own
        "--tensor 2 --objective fiberpo --micro-batch-tokens 128",  # single pass
    ],
)
def test_gradient_equals_the_float64_reference(arguments: str):
    done = compare(*arguments.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # float32 against float64: rounding of log-probs moves coefficients by about 1e-6 of the largest
    assert 0 < found["coefficient_max_relative_diff"] < 1e-5
    assert 0 < found["gradient_max_relative_diff"] < 1e-5


def test_a_layout_that_does_not_divide():
    done = compare("--expert", "3", "--data", "3")
    assert done.returncode != 0
    assert "parallel.expert = 3 does not divide the number of experts = 8" in done.stderr
