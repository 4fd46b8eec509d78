from pathlib import Path

import pytest

from fiberpo_megatron.config import Config, load_config
from fiberpo_megatron.fibration import build_objective

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples").rglob("*.toml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_loads_and_builds_its_objective(path: Path):
    config = load_config(path)
    build_objective(
        config.algorithm.objective.use, **config.algorithm.objective_options([it.name for it in config.environments])
    )
    assert config.parallel.world_size() >= 1


def waits_of(config: Config) -> dict[str, float]:
    engine = config.rollout.engine
    return {
        "rollout.engine.start_timeout_s": engine.start_timeout_s,
        "rollout.engine.request_timeout_s": engine.request_timeout_s,
        "weight_sync.timeout_s": config.weight_sync.timeout_s,
    }


def test_waits_are_long_enough_for_a_large_model_and_no_shipped_config_shortens_them():
    """The numbers of docs/gpu.md: reading 61 GB, compiling kernels and capturing CUDA graphs take many minutes."""
    usual = waits_of(Config.model_validate({"model": {"path": "m"}}))
    assert list(usual.values()) == [1800.0, 3600.0, 900.0]
    for path in CONFIGS:
        for name, seconds in waits_of(load_config(path)).items():
            assert seconds >= usual[name], f"{path}: {name}"
