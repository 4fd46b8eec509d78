from pathlib import Path

import pytest

from fiberpo_megatron.config import ConfigError, dump_config, load_config

MINIMAL = """
[model]
path = "somewhere"
[[data.tasks]]
kind = "addition"
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(MINIMAL)
    return path


def test_overrides_take_both_spellings_and_types(config_file: Path):
    config = load_config(
        config_file,
        [
            "--parallel.tensor",
            "2",
            "--optimizer.learning_rate=3e-4",
            "--data.tasks.0.digits",
            "3",
            "--model.path",
            "x/y",
        ],
    )
    assert (config.parallel.tensor, config.optimizer.learning_rate) == (2, 3e-4)
    assert config.data.tasks[0].digits == 3 and config.model.path == Path("x/y")


def test_resolved_config_reads_back_equal(config_file: Path, tmp_path: Path):
    config = load_config(
        config_file, ["--algorithm.budgets", "{trajectory = [0.2, 0.1]}", "--algorithm.epsilon", "[0.2, 0.3]"]
    )
    again = tmp_path / "again.toml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--parallel.tensr", "2"], r"parallel.tensr: unknown key; did you mean 'tensor'"),
        (["--rollout.engine.urlz", "[]"], r"rollout.engine.urlz: unknown key; did you mean 'urls'"),
        (["--nonsense", "1"], "nonsense: unknown key"),
        (["--parallel.tensor", "0"], r"parallel.tensor: .*greater than or equal to 1.*value seen: 0"),
        (
            ["--batch.mini_batches", "5"],
            r"batch.mini_batches = 5 does not divide batch.prompts = 32; use one of",
        ),
        (["--parallel.tensor"], "has no value"),
        (["parallel.tensor", "2"], "is not an override"),
        (["--data.tasks.7.digits", "2"], "not an index of a list of 1"),
        (["--data.tasks", "[]"], "data.tasks: List should have at least 1 item"),
    ],
)
def test_bad_overrides_are_explained(config_file: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, overrides)


def test_missing_and_broken_files_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere.toml does not exist"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "b.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="b.toml cannot be read as TOML"):
        load_config(tmp_path / "b.toml")


def test_world_size_takes_the_smallest_data_size_that_experts_allow(config_file: Path):
    def world(*overrides: str) -> int:
        return load_config(config_file, ["--parallel.expert", "2", *overrides]).parallel.world_size()

    assert world() == 2
    assert world("--parallel.tensor", "2") == 2
    assert world("--parallel.context", "2") == 2
    assert world("--parallel.pipeline", "2") == 4
