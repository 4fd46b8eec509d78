"""The Dockerfile, the Apptainer definition and their scripts, as far as they can be checked without an image registry.

tools/image/build_cpu.sh builds the cpu target for real (minutes, root); nothing here does.
"""

import os
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
    (base,) = re.findall(r"^ARG PYTORCH_IMAGE=(\S+)$", docker, re.MULTILINE)
    (same,) = re.findall(r"^From: (\S+)$", apptainer, re.MULTILINE)
    assert same == re.sub(r":[^:@]+@", "@", base), "Apptainer takes no tag beside a digest"
    assert base.partition("@")[0] in apptainer, "a comment names the tag"
    assert re.search(r":\d\d\.\d\d-py3@", base), "the base image's version is named"
    cuda = docker.split(" AS cpu")[0]
    steps = r"/opt/build/(\w+\.sh)( /opt/fiberpo)?$"
    assert re.findall("^RUN " + steps, cuda, re.MULTILINE) == re.findall("^    " + steps, apptainer, re.MULTILINE)
    for setting in ("FIBERPO_SGLANG_PYTHON=/opt/sglang/bin/python", "LD_LIBRARY_PATH=/opt/nccl:"):
        assert setting in cuda and f"export {setting}" in apptainer


def test_the_engines_interpreter_needs_no_ensurepip():
    """Debian's and Ubuntu's Python may lack it; then `python3 -m venv` fails, and the environment has no pip."""
    script = (ROOT / "tools/image/cuda_sglang.sh").read_text()
    assert "python3 -m venv --without-pip /opt/sglang" in script
    assert "python3 -m pip --python /opt/sglang/bin/python install" in script


def test_every_base_image_is_named_by_its_digest():
    docker = (ROOT / "Dockerfile").read_text()
    images = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", docker, re.MULTILINE))
    for name, image in images.items():
        assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", image), name
    used = re.findall(r"^FROM (\S+)", docker, re.MULTILINE)
    assert used == ["${PYTORCH_IMAGE}", "${PYTHON_IMAGE}"] and len(images) == 2
    assert "# syntax=" not in docker, "a frontend is an image, too, and would have to be named by its digest"
    (apptainer,) = re.findall(r"^From: (\S+)$", (ROOT / "apptainer.def").read_text(), re.MULTILINE)
    assert re.fullmatch(r"[^:@]+@sha256:[0-9a-f]{64}", apptainer)


DOCKER = """#!/usr/bin/env bash
case $4 in
  *@sha256:b*) echo "not found" >&2; exit 1 ;;
  *@*) echo "${4#*@}" ;;
  *) echo "sha256:$(printf 'a%.0s' {1..64})" ;;
esac
"""
"""A registry in which every tag names sha256:aa..., and nothing has a digest that begins with b."""


@pytest.mark.parametrize(
    ("digest", "code", "message"),
    [
        ("@sha256:" + 64 * "a", 0, "X_IMAGE: host/python:3 is the named image"),
        ("@sha256:" + 64 * "c", 0, f"host/python:3 is now sha256:{64 * 'a'}"),
        ("@sha256:" + 64 * "b", 1, f"the registry does not have sha256:{64 * 'b'} of host/python:3"),
        ("", 1, "X_IMAGE=host/python:3 has no digest; write host/python:3@sha256:..."),
        ("@sha256:abc", 1, "has no digest"),
    ],
)
def test_base_images_are_compared_with_their_registry(tmp_path, digest, code, message):
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    file = tmp_path / "Dockerfile"
    file.write_text(f"ARG X_IMAGE=host/python:3{digest}\nFROM $X_IMAGE\n")
    command = ["bash", ROOT / "tools/image/base_images.sh", file]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert (done.returncode, message in done.stdout + done.stderr) == (code, True), done


def test_one_version_of_sglang_everywhere():
    versions = {
        version
        for name in (
            "setup.py",
            "tools/requirements-cpu-nodeps.txt",
            "tools/image/sglang.txt",
            "tools/image/sglang.lock",
        )
        for version in re.findall(r"sglang==([\d.]+)", (ROOT / name).read_text())
    }
    assert len(versions) == 1


def test_the_engines_of_the_cuda_image_come_from_a_lock():
    script = (ROOT / "tools/image/cuda_sglang.sh").read_text()
    assert "--no-deps --require-hashes --only-binary :all:" in script and "sglang.lock" in script
    assert "COPY tools/image/cuda_sglang.sh tools/image/sglang.lock /opt/build/" in (ROOT / "Dockerfile").read_text()


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
