"""Objectives and advantages against implementations that nobody here wrote: verl's and TRL's, from their packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = Path(sys.prefix) / "peers-verl-0.9.1-trl-1.16.0"


@pytest.mark.timeout(600)
def test_objectives_and_advantages_are_those_of_verl_and_trl() -> None:
    if not PEERS.is_dir():
        pytest.skip(f"{PEERS} is missing; `make test` installs verl and TRL there, without their dependencies")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--noconftest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(HERE / "outside_cases.py"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PEERS)])},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=590,
    )
    assert result.returncode == 0, result.stdout
