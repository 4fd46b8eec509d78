"""The Dockerfile, the Apptainer definition and their scripts, as far as they can be checked without an image registry.

tools/image/build_cpu.sh builds the cpu target for real (minutes, root); nothing here does.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = sorted(ROOT.glob("tools/**/*.sh"))


def test_hadolint_has_nothing_to_say():
    done = subprocess.run([BIN / "hadolint", "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_apptainer_builds_what_docker_builds():
    """Same base image, the same build scripts, the same environment."""
    docker, apptainer = (ROOT / "Dockerfile").read_text(), (ROOT / "apptainer.def").read_text()
    base = re.findall(r"^ARG PYTORCH_IMAGE=(\S+)$", docker, re.MULTILINE)
    assert base == re.findall(r"^From: (\S+)$", apptainer, re.MULTILINE)
    assert re.search(r":\d\d\.\d\d-py3$", base[0]), "the base image's version is pinned"
    cuda = docker.split(" AS cpu")[0]
    steps = r"/opt/build/(\w+\.sh)( /opt/fiberpo)?$"
    assert re.findall("^RUN " + steps, cuda, re.MULTILINE) == re.findall("^    " + steps, apptainer, re.MULTILINE)
    for setting in ("FIBERPO_SGLANG_PYTHON=/opt/sglang/bin/python", "LD_LIBRARY_PATH=/opt/nccl:"):
        assert setting in cuda and f"export {setting}" in apptainer


def test_one_version_of_sglang_everywhere():
    versions = {
        re.search(r"sglang==([\d.]+)", (ROOT / name).read_text()).group(1)
        for name in ("setup.py", "tools/requirements-cpu-nodeps.txt", "tools/image/cuda_sglang.sh")
    }
    assert len(versions) == 1


@pytest.mark.parametrize("stage", ["cuda", "cpu"])
def test_each_image_runs_as_a_plain_user_with_the_command_as_entry_point(stage):
    """Read off the last instruction of each kind in the stage."""
    (text,) = re.findall(rf" AS {stage}\n(.*?)(?=\nFROM |\Z)", (ROOT / "Dockerfile").read_text(), re.DOTALL)
    last = dict(re.findall(r"^(USER|ENTRYPOINT|HEALTHCHECK) (.*)$", text, re.MULTILINE))
    assert last["USER"] == "10001:10001"
    assert last["ENTRYPOINT"] == '["fiberpo"]'
    assert last["HEALTHCHECK"].endswith('CMD ["fiberpo", "--version"]')


def test_the_build_context_is_a_list_of_sources():
    """Everything is left out but what is named: keys, runs and environments cannot slip into a layer."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    named = {rule[1:] for rule in rules if rule[0] == "!"}
    copied = set()
    for line in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        copied |= {path.split("/")[0] for path in line.split() if path != "."}
    assert copied <= named and all((ROOT / name).exists() for name in named)
