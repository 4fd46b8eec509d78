"""What cannot work on GPUs is refused before anything starts; the GPUs are pretended, the checks are the run's own."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from examples.demo.make_model import write_model
from fiberpo_megatron.cli.main import local_world_size
from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.engines import command, libraries
from fiberpo_megatron.engines.command import TorchLibraries, torch_libraries
from fiberpo_megatron.trainer import gpu_checks
from fiberpo_megatron.trainer.preflight import preflight

ROOT = Path(__file__).parents[2]
GPU_CONFIGS = [("demo/warmup_gpu.toml", "sft"), ("demo/train_gpu.toml", "train"), ("smollm2/train_gpu.toml", "train")]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend so many GPUs."""
    from fiberpo_megatron.trainer import run  # noqa: F401  Megatron is imported before GPUs are pretended

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.chdir(ROOT)
    return pretend


def shipped(tmp_path: Path, file: str, *options: str) -> Config:
    """Return the config of an example with a model folder and a run folder that exist."""
    model = tmp_path / "model"
    if not model.exists():
        write_model(model)
        save_file({"weight": torch.zeros(1)}, model / "model.safetensors")  # weights are there, and not yet read
    words = ["--model.path", str(model), "--run.folder", str(tmp_path / "run"), *options]
    return load_config(ROOT / "examples" / file, words)


def check(config: Config, command: str = "train", here: bool = True) -> None:
    gpu_checks.check_gpus(config, command, local_world_size(config), here)


@pytest.mark.parametrize(("file", "command"), [("demo/train.toml", "train"), ("demo/warmup.toml", "sft")])
def test_float32_is_refused_on_a_gpu_and_not_without_one(tmp_path: Path, gpus, file: str, command: str):
    config = shipped(tmp_path, file, "--parallel.expert", "1")
    check(config, command)
    gpus(2)
    with pytest.raises(ConfigError, match='model.dtype = "float32" on a GPU.*set model.dtype = "bfloat16"'):
        preflight(config, command, resume=False, world_size=1)


def test_a_float32_engine_is_refused_on_a_gpu(tmp_path: Path, gpus):
    gpus(1)
    with pytest.raises(ConfigError, match='rollout.engine.dtype = "float32" on a GPU'):
        check(shipped(tmp_path, "demo/train_gpu.toml", "--rollout.engine.dtype", "float32"))


def test_a_job_for_gpus_is_refused_on_the_login_node(tmp_path: Path):
    float32 = ("--parallel.expert", "1", "--slurm.gpus_per_node")
    check(shipped(tmp_path, "demo/train.toml", *float32, "0"), here=False)
    with pytest.raises(ConfigError, match='model.dtype = "float32" on a GPU'):
        check(shipped(tmp_path, "demo/train.toml", *float32, "8"), here=False)


@pytest.mark.parametrize(("file", "command"), GPU_CONFIGS)
def test_the_gpu_variants_pass_on_one_gpu(tmp_path: Path, gpus, file: str, command: str):
    gpus(1)
    config = shipped(tmp_path, file)
    assert local_world_size(config) == 1
    preflight(config, command, resume=False, world_size=1)


@pytest.mark.parametrize("name", ["warmup", "train"])
def test_the_demo_on_a_gpu_differs_from_the_demo_in_what_a_gpu_needs_alone(name: str):
    cpu, gpu = (load_config(ROOT / f"examples/demo/{name}{end}.toml").model_dump() for end in ("", "_gpu"))
    differ = {section for section in cpu if cpu[section] != gpu[section]}
    assert differ <= {"run", "model", "parallel", "rollout", "weight_sync"}
    assert gpu["model"]["dtype"] == "bfloat16"


def test_every_rank_and_engine_needs_a_gpu(tmp_path: Path, gpus):
    config = shipped(tmp_path, "demo/train_gpu.toml", "--parallel.data", "2")
    gpus(1)
    with pytest.raises(ConfigError, match="makes 2 training ranks on this machine, which has 1 GPU; every rank needs"):
        check(config)
    gpus(2)
    check(config)
    alone = shipped(tmp_path, "demo/train_gpu.toml", "--rollout.engine.colocated", "false")
    gpus(1)
    with pytest.raises(ConfigError, match="1 engine of 1 GPU beside 1 training ranks need 2 GPUs, this machine has 1"):
        check(alone)
    gpus(2)
    check(alone)


def test_slurm_may_show_every_rank_one_gpu(tmp_path: Path, gpus, monkeypatch: pytest.MonkeyPatch):
    gpus(1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    gpu_checks.check_gpus(shipped(tmp_path, "demo/train_gpu.toml", "--parallel.data", "2"), "train", 2, here=True)


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0)])
def test_a_rank_takes_its_gpu_or_the_one_that_slurm_shows_it(gpus, monkeypatch, visible, local_rank, index):
    from fiberpo_megatron.mcore.gpu_platform import GpuPlatform

    gpus(visible)
    chosen = []
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert GpuPlatform().device == torch.device("cuda", index) and chosen == [torch.device("cuda", index)]


def test_two_versions_of_nccl_are_refused_for_the_way_that_needs_one(tmp_path, gpus, monkeypatch):
    words = (
        "--weight_sync.method",
        "distributed",
        "--rollout.engine.colocated",
        "false",
    )
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    gpus(2)
    found = {sys.executable: TorchLibraries("2.14.1", "2.30.7"), str(other): TorchLibraries("2.14.1", "2.28.3")}
    monkeypatch.setattr(libraries, "torch_libraries", found.__getitem__)
    config = shipped(tmp_path, "demo/train_gpu.toml", *words, "--rollout.engine.python", str(other))
    with pytest.raises(ConfigError, match=r"the trainer has NCCL 2.30.7 \(torch 2.14.1\).*has NCCL 2.28.3"):
        check(config)
    found[str(other)] = found[sys.executable]
    check(config)


def test_an_interpreters_libraries_are_those_that_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exec(command._ASK_TORCH)  # what the interpreter is asked, in this one, which has imported torch
    version, nccl = capsys.readouterr().out.split()
    assert version == torch.__version__ and (nccl == "none") != torch.distributed.is_nccl_available()
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 2.14.1+cu130 2.30.7\n")
    other.chmod(0o755)
    assert torch_libraries(str(other)) == TorchLibraries("2.14.1+cu130", "2.30.7")
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    with pytest.raises(RuntimeError, match="cannot import torch"):
        torch_libraries(str(other))
