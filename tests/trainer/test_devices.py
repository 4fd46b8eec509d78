"""Where engines that a run starts find their GPUs."""

import pytest
import torch

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.trainer.preflight import _check_colocated


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from fiberpo_megatron.trainer import run  # noqa: F401  Megatron is imported before GPUs are pretended

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_engines_stand_behind_the_training_ranks_or_on_their_gpus(eight_gpus: None):
    from fiberpo_megatron.sources.build import _first_engine_gpu

    assert _first_engine_gpu(EngineConfig(count=2, tensor=2), local_ranks=4) == 4
    assert _first_engine_gpu(EngineConfig(count=4, tensor=2, colocated=True), local_ranks=8) == 0
    assert _first_engine_gpu(EngineConfig(urls=["http://elsewhere:1"]), local_ranks=8) == 0
    with pytest.raises(
        ValueError, match=r"8 training ranks and 1 engines of 2 GPUs need 10 GPUs.*has 8.*colocated = true"
    ):
        _first_engine_gpu(EngineConfig(tensor=2), local_ranks=8)


def test_nccl_is_not_asked_to_connect_two_processes_on_one_gpu(eight_gpus: None):
    config = {"model": {"path": "m"}}
    shared = config | {"rollout": {"engine": {"colocated": True}}}
    _check_colocated(Config.model_validate(config))
    for method in ("disk", "ipc"):
        _check_colocated(Config.model_validate(shared | {"weight_sync": {"method": method}}))
    with pytest.raises(ConfigError, match=r'set weight_sync.method = "ipc"'):
        _check_colocated(Config.model_validate(shared))


def test_without_a_gpu_there_is_nothing_to_share():
    from fiberpo_megatron.sources.build import _first_engine_gpu

    if not torch.cuda.is_available():
        assert _first_engine_gpu(EngineConfig(count=9), local_ranks=9) == 0
