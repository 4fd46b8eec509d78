"""What the README installs on a GPU resolves, in one set of versions (docs/gpu.md).

uv asks the package index for metadata alone, and installs nothing.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.tools.setup_requirements import setup_requirements

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "tools/requirements-gpu.txt"
(UV,) = re.findall(r"^UV := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
PLATFORM = "x86_64-manylinux_2_34"


def commands() -> list[str]:
    """Return pip's commands in the README's section about GPUs."""
    section = (ROOT / "README.md").read_text().split("\n## On GPUs\n")[1].split("\n## ")[0]
    return [line.partition("#")[0].strip() for line in section.splitlines() if line.startswith("pip install")]


def pinned() -> dict[str, Requirement]:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    return {Requirement(line).name: Requirement(line) for line in lines}


def test_torch_is_installed_first_in_the_version_that_all_agree_on():
    first, second = commands()
    words = first.split()[2:]
    assert words[0] == str(pinned()["torch"]) and {"setuptools", "wheel", "pybind11", "ninja"} <= set(words)
    assert second == "pip install --no-build-isolation -r tools/requirements-gpu.txt ."
    for requirement in pinned().values():
        assert re.fullmatch(r"==[\d.]+", str(requirement.specifier)), f"{requirement} is no exact version"
    declared = {requirement.name: requirement for requirement in setup_requirements()["cuda"]}
    for name, requirement in declared.items():
        (pin,) = pinned()[name].specifier
        assert requirement.specifier.contains(pin.version) and requirement.extras == pinned()[name].extras


@pytest.mark.skipif(not (ROOT / UV).exists(), reason="`make test` installs uv")
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_commands_resolve_for_linux_and_cuda_13(python: str, tmp_path: Path):
    wanted = tmp_path / "wanted.txt"
    ours = [str(requirement) for requirement in setup_requirements()[""]]
    wanted.write_text("\n".join([REQUIREMENTS.read_text(), *ours]))
    call = [str(ROOT / UV / "bin/uv"), "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    call += ["--python-version", python, "--python-platform", PLATFORM, str(wanted)]
    done = subprocess.run(
        call, capture_output=True, text=True, timeout=240, env=os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    )
    assert done.returncode == 0, done.stderr
    found = {
        canonicalize_name(name): Version(version)
        for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", done.stdout, re.MULTILINE)
    }
    for name, requirement in pinned().items():
        assert requirement.specifier.contains(found[canonicalize_name(name)]), name
    assert found["transformer-engine-torch"] == found["transformer-engine-cu13"] == found["transformer-engine"]
    assert found["nvidia-cuda-runtime"].major == 13, "the driver in the README is that of CUDA 13"
    assert not [name for name in found if name.startswith("nvidia-") and name.endswith("-cu12") and "dsl" not in name]
