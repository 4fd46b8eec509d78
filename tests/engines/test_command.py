"""Command line and environment of a server."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fiberpo_megatron.engines.command import (
    CPU_STAND_INS,
    ONLINE_UPDATES,
    PLUGIN,
    Server,
    server_command,
    server_environment,
)
from fiberpo_megatron.engines.connection import KEEP_ALIVE_S
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.subprocesses import GPU_VARIABLES


def server(model: Path, **changes) -> Server:
    usual = {"dtype": "float32", "host": "127.0.0.1", "port": 18001, "internal_port": 18002, "seed": 3, "gpu": False}
    return Server(model=model, **(usual | changes))


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def test_without_gpu(model):
    command = server_command(server(model, deterministic=True, routed_experts=True), EngineConfig())
    assert value(command, "--device") == "cpu" and value(command, "--max-total-tokens") == "16384"
    assert value(command, "--host") == "127.0.0.1" and value(command, "--port") == "18001"
    assert value(command, "--nccl-port") == "18002" and value(command, "--random-seed") == "3"
    assert {"--sleep-on-idle", "--enable-deterministic-inference", "--enable-return-routed-experts"} <= set(command)
    assert "--load-format" not in command


def test_with_gpu(model):
    config = EngineConfig(tensor=4, memory_fraction=0.5, max_running_requests=7, extra_args=["--x", "1"])
    command = server_command(server(model, gpu=True, first_gpu=2, dtype="bfloat16"), config)
    assert value(command, "--tp-size") == "4" and value(command, "--base-gpu-id") == "2"
    assert value(command, "--mem-fraction-static") == "0.5" and value(command, "--max-running-requests") == "7"
    assert command[-2:] == ["--x", "1"]
    assert "--enable-memory-saver" not in command
    cpu_only = {"--device", "--max-total-tokens", "--attention-backend", "--disable-radix-cache"}
    assert not set(command) & {*cpu_only, "--enable-deterministic-inference", "--enable-return-routed-experts"}


def test_only_engines_on_the_trainers_gpus_can_give_memory_up(model):
    config = EngineConfig(colocated=True)
    assert "--enable-memory-saver" in server_command(server(model, gpu=True), config)
    assert "--enable-memory-saver" not in server_command(server(model), config)  # needs CUDA


def test_a_model_without_weights_starts_with_random_ones(tmp_path):
    assert value(server_command(server(tmp_path), EngineConfig()), "--load-format") == "dummy"


def test_the_launchers_variables_do_not_reach_the_server():
    """Under torchrun the server's own rendezvous would join the trainer's store and hang."""
    parent = {"RANK": "1", "MASTER_PORT": "5", "TORCHELASTIC_USE_AGENT_STORE": "True", "HOME": "/h", "PYTHONPATH": "/p"}
    where = server(Path("/m"), gpu=True)
    gpu = server_environment(parent, EngineConfig(), where, key=7)
    assert not set(gpu) & {"RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"}
    assert gpu["HOME"] == "/h" and gpu["PYTHONPATH"] == f"{PLUGIN}:/p"
    assert gpu["FIBERPO_API_KEY_FD"] == "7" and gpu["GLOO_SOCKET_IFNAME"] == "lo"
    cpu = server_environment(parent, EngineConfig(threads=2), replace(where, gpu=False), key=None)
    assert "FIBERPO_API_KEY_FD" not in cpu
    assert int(gpu["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 10 * KEEP_ALIVE_S  # a reused connection must not just be closing
    assert cpu["PYTHONPATH"] == f"{PLUGIN}:{CPU_STAND_INS}:/p" and cpu["OMP_NUM_THREADS"] == "2"
    assert (CPU_STAND_INS / "triton" / "__init__.py").is_file()


def test_a_server_without_a_gpu_has_as_many_ranks_as_asked_for(monkeypatch):
    """SGLang refuses more ranks than NUMA nodes unless it is told the cores of each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 1, 3})
    where = server(Path("/m"))
    assert value(server_command(where, EngineConfig(tensor=2)), "--tp-size") == "2"
    cores = "SGLANG_CPU_OMP_THREADS_BIND"
    assert server_environment({}, EngineConfig(tensor=2), where, key=None)[cores] == "1,5|3"
    assert server_environment({}, EngineConfig(tensor=4), where, key=None)[cores] == "1|3|5|1"
    assert server_environment({cores: "0|1"}, EngineConfig(tensor=2), where, key=None)[cores] == "0|1"
    assert cores not in server_environment({}, EngineConfig(), where, key=None)


PAGES_OF_A_SECOND_BUFFER = """
import ctypes, resource

libc, size = ctypes.CDLL(None), 100 * 2**20
libc.malloc.restype = ctypes.c_void_p
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: the pages are small ones everywhere
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(buffer, 1, size)
    libc.free(ctypes.c_void_p(buffer))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (size / resource.getpagesize()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are those of glibc")
def test_a_server_without_a_gpu_uses_the_memory_of_large_tensors_again():
    """The kernel clears the pages of a new mapping: SGLang allocates a buffer for every round of new weights."""

    def pages(environment: dict[str, str]) -> float:
        command = [sys.executable, "-IS", "-c", PAGES_OF_A_SECOND_BUFFER]
        return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=60).stdout)

    assert pages({}) > 0.9
    assert pages(server_environment({}, EngineConfig(), server(Path("/m")), key=None)) < 0.01
    on_gpu = server_environment({}, EngineConfig(), server(Path("/m"), gpu=True), key=None)
    assert not [name for name in on_gpu if name.startswith("MALLOC_")]


def test_engines_and_ranks_have_the_same_variables_for_nccl(monkeypatch):
    """SGLang sets NCCL_CUMEM_ENABLE and NCCL_NVLS_ENABLE to 0 where they are unset; the ranks must not differ."""
    from fiberpo_megatron.mcore import platform

    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    platform.prepare()
    rank = {name: os.environ[name] for name in GPU_VARIABLES}
    engine = server_environment({"NCCL_NVLS_ENABLE": "1"}, EngineConfig(), server(Path("/m"), gpu=True), key=None)
    assert rank == {name: engine[name] for name in GPU_VARIABLES}
    assert rank == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}


def test_an_engine_with_a_python_of_its_own_does_not_load_the_images_torch(tmp_path):
    image, nccl, python = tmp_path / "torch/lib", tmp_path / "nccl", tmp_path / "python"
    image.mkdir(parents=True)
    (image / "libc10.so").touch()
    nccl.mkdir()
    python.touch(mode=0o755)
    parent = {"LD_LIBRARY_PATH": f"{image}:{nccl}:/nowhere"}
    where = server(Path("/m"), gpu=True)
    own = server_environment(parent, EngineConfig(python=python), where, key=None)
    assert own["LD_LIBRARY_PATH"] == f"{nccl}:/nowhere"
    same = server_environment(parent, EngineConfig(python=Path(sys.executable)), where, key=None)
    assert same["LD_LIBRARY_PATH"] == parent["LD_LIBRARY_PATH"]


def test_expandable_segments_do_not_reach_an_engine_with_the_memory_saver():
    parent = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:128,expandable_segments:True",
    }
    where = server(Path("/m"), gpu=True)
    shared = server_environment(parent, EngineConfig(colocated=True), where, key=None)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in shared and shared["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128"
    alone = server_environment(parent, EngineConfig(), where, key=None)
    assert {name: alone[name] for name in parent} == parent


def test_no_copy_of_old_weights_keeps_an_engine_from_taking_new_ones():
    """SGLang's own message names these variables; each must exist there, or it would change nothing."""
    from importlib.util import find_spec

    gpu = server_environment({}, EngineConfig(), server(Path("/m"), gpu=True), key=None)
    package = find_spec("sglang")
    assert package is not None and package.origin is not None
    known = (Path(package.origin).parent / "srt/environ.py").read_text()
    for name in ONLINE_UPDATES:
        assert gpu[name] == "0" and f"    {name} = EnvBool(True)\n" in known


def test_the_engines_interpreter(model, tmp_path, monkeypatch):
    """The config's, else the environment's, else the trainer's own."""
    theirs, images = tmp_path / "theirs", tmp_path / "images"
    for file in (theirs, images):
        file.touch(mode=0o755)
    assert server_command(server(model), EngineConfig())[0] == sys.executable
    monkeypatch.setenv("FIBERPO_SGLANG_PYTHON", str(images))
    assert server_command(server(model), EngineConfig())[0] == str(images)
    assert server_command(server(model), EngineConfig(python=theirs))[0] == str(theirs)
    theirs.unlink()
    with pytest.raises(FileNotFoundError, match="rollout.engine.python = .*theirs is not an executable"):
        server_command(server(model), EngineConfig(python=theirs))
