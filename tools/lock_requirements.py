#!/usr/bin/env python3
"""Write the lock files: every package that the shipped environments install, in one version, with its files' hashes.

Run `make lock` after a change of the versions in setup.py or in the files below; it needs the package index. Installing
from a lock (`pip install --no-deps --require-hashes`) takes exactly these packages, and refuses a file whose content is
another one. tests/tools/test_lock.py compares the locks with setup.py and with the installed environment.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
TORCH = """\
# torch is left out: its build for CPUs (a local version such as 2.13.0+cpu) is not on the package index, so that its
# hash cannot be taken from there. tools/make_env.sh installs it by its exact version, without its dependencies, which
# are below.
"""
UNTRIED = """\
# These versions were resolved for Python 3.12 and CUDA but not installed by us: we had no machine with the cuda image.
"""
PLATFORM = "x86_64-manylinux_2_34"
"""Decides which packages are needed; the hashes are of all files of a version, so that other machines find theirs."""


@dataclass(frozen=True)
class Lock:
    """Says how one lock file is made."""

    path: Path
    sources: tuple[Path, ...]
    """Requirement files whose dependencies are locked with them."""
    python: str
    alone: tuple[Path, ...] = ()
    """Requirement files whose packages are installed without their dependencies."""
    note: str = ""
    """Comment at the head of the file."""
    archives: tuple[str, ...] = ()
    """Packages that exist as source archives only; of all others wheels are locked."""

    def text(self, uv: str) -> str:
        """Return the content of the file, asking the package index."""
        body = [resolve(uv, self.sources, self.python, alone=False)] if self.sources else []
        body += [resolve(uv, self.alone, self.python, alone=True, archives=self.archives)] if self.alone else []
        return f"# Written by `make lock` for Python {self.python}; do not edit.\n{self.note}{''.join(body)}"


LOCKS = (
    Lock(
        TOOLS / "requirements-cpu.lock",
        (TOOLS / "requirements-cpu.txt",),
        "3.11",
        alone=(TOOLS / "requirements-cpu-nodeps.txt",),
        note=TORCH,
    ),
    Lock(TOOLS / "requirements-triton.lock", (), "3.11", alone=(TOOLS / "requirements-triton.txt",)),
    Lock(TOOLS / "requirements-peers.lock", (), "3.11", alone=(TOOLS / "requirements-peers.txt",)),
    *(
        Lock(
            TOOLS / f"requirements-transformer-engine-{version}.lock",
            (),
            "3.11",
            alone=(TOOLS / f"requirements-transformer-engine-{version}.txt",),
        )
        for version in ("2.20.2", "2.10.0")
    ),
    Lock(
        TOOLS / "requirements-megatron-core-0.19.2.lock",
        (),
        "3.12",
        alone=(TOOLS / "requirements-megatron-core-0.19.2.txt",),
    ),
    Lock(
        TOOLS / "requirements-reasoning-gym.lock",
        (),
        "3.11",
        alone=(TOOLS / "requirements-reasoning-gym.txt",),
        archives=("cellpylib", "pycosat", "zss"),
    ),
    Lock(TOOLS / "requirements-verifiers.lock", (TOOLS / "requirements-verifiers.txt",), "3.11"),
    Lock(TOOLS / "image/sglang.lock", (TOOLS / "image/sglang.txt",), "3.12", note=UNTRIED),
)


def resolve(uv: str, sources: tuple[Path, ...], python: str, *, alone: bool, archives: tuple[str, ...] = ()) -> str:
    """Return requirement lines with hashes for some requirement files. Raises RuntimeError with uv's message."""
    with tempfile.TemporaryDirectory() as folder:
        settings, wanted = Path(folder) / "uv.toml", Path(folder) / "wanted.txt"
        text = "".join(source.read_text() for source in sources)
        local = next((line for line in text.splitlines() if line.startswith("torch==") and "+" in line), None)
        settings.write_text(_metadata(local) if local else "")
        wanted.write_text(text.replace(local, local.partition("+")[0]) if local else text)
        command = [uv, "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--config-file", str(settings), "--python-version", python, "--python-platform", PLATFORM]
        command += ["--only-binary", ":all:", *(["--no-deps"] if alone else [])]
        command += [part for name in archives for part in ("--no-binary", name)]
        command += [*(["--no-emit-package", "torch"] if local else []), str(wanted)]
        environment = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"uv could not resolve {', '.join(map(str, sources))}:\n{done.stderr.strip()}")
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def _metadata(torch: str) -> str:
    """Return uv's settings for the CPU build of torch, which asks for less than the index's build for CUDA does."""
    from importlib.metadata import requires, version

    if version("torch") != torch.partition("==")[2]:
        raise RuntimeError(f"{torch} is not installed here (found {version('torch')}); run `make env` first")
    needed = [line for line in requires("torch") or [] if "extra ==" not in line]
    public = version("torch").partition("+")[0]
    return f'[[dependency-metadata]]\nname = "torch"\nversion = "{public}"\nrequires-dist = {needed}\n'


def main() -> None:
    """Write all lock files."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} PATH_OF_UV (`make lock` installs it)")
    for lock in LOCKS:
        lock.path.write_text(lock.text(sys.argv[1]))
        print(f"{lock.path.relative_to(ROOT)}: {lock.path.read_text().count('==')} packages")


if __name__ == "__main__":
    main()
