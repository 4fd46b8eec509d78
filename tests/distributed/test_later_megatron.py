"""The suites of parity, checkpoints and Transformer Engine over megatron-core 0.19.2.

0.19.2 asks for Python 3.12, for which there is no build of torch for CPUs among our packages. `make test-all` unpacks
its Python files into a folder that is on no path; what this package uses of them runs on Python 3.11 too. Each test
here runs the tests of another file in a process that finds this folder first. Triton is there as well, because 0.19.2
imports it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_ready.te_stub import TRITON

ROOT = Path(__file__).parents[2]
LATER = Path(sys.prefix) / "megatron-core-0.19.2"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (LATER, ROOT, TRITON))),
    "TORCH_COMPILE_DISABLE": "1",
}
SUITES = {
    "layouts": "tests/distributed/test_parity.py",
    "layouts and objectives": "tests/distributed/test_layout_parity.py",
    "checkpoints": "tests/distributed/test_checkpoint_resume.py",
    "layers of a GPU": "tests/gpu_ready/test_te_build.py",
}
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not LATER.is_dir(), reason=f"{LATER} is missing; `make test-all` installs it"),
]


def test_the_folder_has_the_later_version():
    code = (
        "from importlib.metadata import version; import megatron.core as m; print(version('megatron-core'), m.__file__)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0.19.2", str(LATER / "megatron/core/__init__.py")], done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", SUITES)
def test_suite(name: str):
    command = [sys.executable, "-m", "pytest", SUITES[name], "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=2300)
    assert done.returncode == 0, done.stdout[-6000:]
