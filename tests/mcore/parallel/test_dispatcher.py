"""DeepEP's dispatcher is refused by name where it cannot run, before anything starts, and else reaches Megatron."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.demo.make_model import write_model
from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.parallel import dispatcher
from fiberpo_megatron.mcore.parallel.dispatcher import check_dispatcher
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.mcore.transformer_config import transformer_config
from fiberpo_megatron.trainer.preflight import preflight
from tests.distributed.parity import MODELS, QWEN3_MOE

FLEX: dict[str, Any] = {"moe_dispatcher": "flex", "expert": 2, "data": 2}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend a GPU, and a DeepEP, or none."""

    def pretend(gpu: bool, deep_ep: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(dispatcher, "find_spec", lambda name: SimpleNamespace() if deep_ep else None)

    return pretend


@pytest.mark.parametrize(
    ("model", "parallel", "gpu", "deep_ep", "says"),
    [
        ("dense", FLEX, True, True, "a qwen2 model has no experts"),
        ("moe", {"moe_dispatcher": "flex"}, True, True, "with parallel.tensor = 1 and parallel.expert = 1 no token"),
        ("moe", FLEX, False, True, "DeepEP needs a GPU, and this machine has none"),
        ("moe", FLEX, True, False, "the package deep_ep cannot be imported; install DeepEP"),
    ],
)
def test_what_flex_cannot_run_on_is_refused(machine, model: str, parallel, gpu: bool, deep_ep: bool, says: str):
    machine(gpu, deep_ep)
    architecture = read_architecture(MODELS[model])
    with pytest.raises(ValueError, match=rf'^parallel.moe_dispatcher = "flex": {says}.*, or set .* = "alltoall"$'):
        check_dispatcher(architecture, ParallelConfig(**parallel))
    check_dispatcher(architecture, ParallelConfig(**parallel | {"moe_dispatcher": "alltoall"}))


def test_flex_is_accepted_with_a_gpu_and_deepep_and_a_login_node_is_not_asked_for_them(machine):
    architecture = read_architecture(QWEN3_MOE)
    machine(True, True)
    check_dispatcher(architecture, ParallelConfig(**FLEX))
    check_dispatcher(architecture, ParallelConfig(moe_dispatcher="flex", tensor=2))
    machine(False, False)
    check_dispatcher(architecture, ParallelConfig(**FLEX), here=False)


def test_a_run_is_refused_before_anything_starts(tmp_path: Path):
    write_model(tmp_path / "model")
    sections = {
        "model": {"path": tmp_path / "model", "random_init": True},
        "run": {"folder": tmp_path / "run"},
        "parallel": FLEX,
        "environments": [{"name": "a", "use": "examples.demo.environments:Addition"}],
    }
    with pytest.raises(ConfigError, match='parallel.moe_dispatcher = "flex": DeepEP needs a GPU'):
        preflight(Config.model_validate(sections), "sft", False, 2)


@pytest.mark.parametrize(
    ("model", "asked", "kind"),
    [
        ("moe", FLEX, "flex"),
        ("moe", {"expert": 2, "data": 2}, "alltoall"),
        ("dense", {"tensor": 2}, "alltoall"),  # the default of Megatron refuses sequences of different lengths
    ],
)
def test_the_choice_reaches_megatron(model: str, asked: dict[str, Any], kind: str):
    layout: Any = SimpleNamespace(parallel=ParallelConfig(**asked))
    config = transformer_config(read_architecture(MODELS[model]), ModelConfig(path=Path("unused")), layout)
    assert config.moe_token_dispatcher_type == kind
    assert kind != "flex" or config.moe_flex_dispatcher_backend == "deepep"
