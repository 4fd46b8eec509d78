"""Layout parity over megatron-core 0.19.2, in an interpreter of its own (Python 3.12).

FIBERPO_MEGATRON_019 names an interpreter with megatron-core 0.19.2, torch, triton and the package's other requirements;
the test is skipped without it, as in CI, which stays on 0.16.1.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERPRETER = os.environ.get("FIBERPO_MEGATRON_019", "")
LAYOUTS = {
    "one rank": [],
    "TP2": ["--tensor", "2"],
    "PP2": ["--pipeline", "2"],
    "CP2": ["--context", "2"],
    "EP2": ["--expert", "2", "--data", "2"],
    "latent TP2": ["--tensor", "2", "--model", "latent"],
    "dense DP2": ["--data", "2", "--model", "dense"],
    "TP2 PP2": ["--tensor", "2", "--pipeline", "2"],
}
TOLERANCE = 1e-5
"""As in tests/distributed/test_layout_parity.py: float32 against float64."""

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not INTERPRETER, reason="FIBERPO_MEGATRON_019 names no interpreter with megatron-core 0.19.2"),
]


def test_the_interpreter_has_the_later_version():
    command = [INTERPRETER, "-c", "from importlib.metadata import version; print(version('megatron-core'))"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip() == "0.19.2"


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layout_does_not_matter(name: str):
    command = [INTERPRETER, "tools/layout_parity.py", "--seed", "4", "--steps", "2", *LAYOUTS[name]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < max(found.values()) < TOLERANCE, found
