"""The fused Triton kernels, in processes of their own.

Triton is not in the tests' environment (Megatron and SGLang behave differently where it can be imported); `make test`
puts it beside, into a folder of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BESIDE = sorted(Path(sys.prefix).glob("triton-*"))


def run_cases(name: str, cache: Path, cases: str = "not exhaustive", **environment: str) -> None:
    """Runs the cases of a file that have these marks, with Triton on the path."""
    path = [str(ROOT)]
    if importlib.util.find_spec("triton") is None:
        if not BESIDE:
            pytest.skip(f"no Triton in this environment and no {sys.prefix}/triton-*; `make test` installs it there")
        path.append(str(BESIDE[-1]))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-m", cases, str(HERE / name)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache), **environment},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1100,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.timeout(1200)
def test_kernels_match_the_torch_passes(tmp_path: Path) -> None:
    run_cases("kernel_cases.py", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_the_other_cases_of_the_kernels(tmp_path: Path) -> None:
    run_cases("kernel_cases.py", tmp_path, "exhaustive", TRITON_INTERPRET="1")


@pytest.mark.timeout(1200)
def test_kernels_compile(tmp_path: Path) -> None:
    run_cases("compile_cases.py", tmp_path, TRITON_INTERPRET="0")


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_the_other_kernels_compile(tmp_path: Path) -> None:
    run_cases("compile_cases.py", tmp_path, "exhaustive", TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_match_the_torch_passes_on_a_gpu(tmp_path: Path) -> None:
    run_cases("kernel_cases.py", tmp_path, "exhaustive or not exhaustive", TRITON_INTERPRET="0")
