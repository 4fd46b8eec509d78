from pathlib import Path

import pytest

from fiberpo_megatron.config import load_config
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
