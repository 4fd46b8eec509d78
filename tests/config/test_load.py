from pathlib import Path

import pytest

from fiberpo_megatron.config import ConfigError, dump_config, load_config
from fiberpo_megatron.settings import PluginConfig

MINIMAL = """
[model]
path = "somewhere"
[[environments]]
name = "sums"
use = "my_package.sums:Sums"
options = {digits = 2}
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
            "--environments.0.options.digits",
            "3",
            "--environments.0.weight=2.5",
            "--environments.0.options.alphabet.letters",
            "ab",
            "--model.path",
            "x/y",
        ],
    )
    assert (config.parallel.tensor, config.optimizer.learning_rate) == (2, 3e-4)
    (environment,) = config.environments
    assert environment.options == {"digits": 3, "alphabet": {"letters": "ab"}} and environment.weight == 2.5
    assert config.model.path == Path("x/y")


def test_resolved_config_reads_back_equal(config_file: Path, tmp_path: Path):
    config = load_config(
        config_file,
        [
            "--algorithm.budgets",
            "{trajectory = [0.2, 0.1]}",
            "--algorithm.epsilon",
            "[0.2, 0.3]",
            "--environments.0.python",
            "/opt/tools/bin/python",
            "--environments.0.options.nested",
            '{list = [1, 2.5, "three", true], when = {deep = ["é"]}}',
            "--environments.0.version",
            "my-package 1.2.0",
            "--optimizer.kind",
            '{use = "my_package.lion:Lion", options = {beta1 = 0.95}}',
            "--telemetry.sinks",
            '["tensorboard", {use = "my_package.sinks:Mine", options = {port = 1}}]',
        ],
    )
    again = tmp_path / "again.toml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dump_config(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--parallel.tensr", "2"], r"parallel.tensr: unknown key; did you mean 'tensor'"),
        (["--rollout.engine.urlz", "[]"], r"rollout.engine.urlz: unknown key; did you mean 'urls'"),
        (["--nonsense", "1"], "nonsense: unknown key"),
        (["--parallel.tensor", "0"], r"parallel.tensor: .*greater than or equal to 1.*value seen: 0"),
        (
            ["--batch.kept_forwards", "4", "--parallel.pipeline", "2"],
            r"batch.kept_forwards = 4 with parallel.pipeline = 2: no forward pass can be kept there; leave .* out",
        ),
        (["--batch.kept_forwards", "2", "--model.fp8", "hybrid"], r'batch.kept_forwards = 2 with model.fp8 = "hybrid"'),
        (
            ["--batch.mini_batches", "5"],
            r"batch.mini_batches = 5 does not divide batch.prompts = 32; use one of",
        ),
        (["--parallel.tensor"], "has no value"),
        (["parallel.tensor", "2"], "is not an override"),
        (["--environments.7.options.digits", "2"], "'7' is not an index of a list of 1 entries"),
        (["--environments.0.digits", "2"], r"environments.0.digits: unknown key"),
        (["--environments.0.on_failure", "retry"], r"environments.0.on_failure: .*'error', 'zero' or 'drop'.*'retry'"),
        (["--environments.0.use", '""'], r"environments.0.use: .*at least 1 character"),
        (["--environments.0.name", "a b"], r"environments.0.name: String should match pattern .*value seen: 'a b'"),
        (["--environments.0.weight", "0"], r"environments.0.weight: .*greater than 0"),
        (["--environments.0.deadline_s", "inf"], r"environments.0.deadline_s: .*finite"),
        (["--environments", '[{name = "sums"}]'], "environments.0.use: is required and not set"),
        (
            ["--environments", '[{name = "a", use = "x:A"}, {name = "a", use = "x:B"}]'],
            "environments: the name 'a' is used twice; give each its own `name`",
        ),
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


@pytest.mark.parametrize(
    "section", ["algorithm.objective", "algorithm.advantage", "optimizer.kind", "weight_sync.method"]
)
def test_a_plugin_is_a_name_or_a_table(config_file: Path, tmp_path: Path, section: str):
    def load(text: str) -> tuple[PluginConfig, str]:
        config = load_config(config_file, [f"--{section}", text])
        part, field = section.split(".")
        return getattr(getattr(config, part), field), dump_config(config)

    plugin, text = load('"my_package.mine:Mine"')
    assert (
        plugin == PluginConfig(use="my_package.mine:Mine")
        and f'\n{section.split(".")[1]} = "my_package.mine:Mine"' in text
    )
    assert load('{use = "my_package.mine:Mine"}') == (plugin, text)
    plugin, text = load('{use = "my_package.mine:Mine", options = {a = 1, b = [2.5]}, version = "mine 1.0"}')
    assert (plugin.use, plugin.options, plugin.version) == ("my_package.mine:Mine", {"a": 1, "b": [2.5]}, "mine 1.0")
    assert f'[{section}]\nuse = "my_package.mine:Mine"\nversion = "mine 1.0"' in text
    assert f"[{section}.options]\na = 1\n" in text
    for bad, message in (
        ("{options = {a = 1}}", f"{section}.use: is required and not set"),
        ('{use = "x:X", option = {}}', f"{section}.option: unknown key; did you mean 'options'"),
        ('""', f"{section}.use: .*at least 1 character"),
        ('{use = "x:X", options = {a = [1, nan]}}', f"{section}.options: options.a.1 = nan: the number must be finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(bad)


def test_sinks_are_names_and_tables_in_their_order(config_file: Path):
    sinks = '["mine:A", {use = "mine:B", options = {port = 1}}]'
    config = load_config(config_file, ["--telemetry.sinks", sinks, "--telemetry.tensorboard", "false"])
    assert config.telemetry.sinks == [PluginConfig(use="mine:A"), PluginConfig(use="mine:B", options={"port": 1})]
    assert config.telemetry.all_sinks() == config.telemetry.sinks


def test_a_run_from_python_may_leave_the_environments_out(tmp_path: Path):
    (tmp_path / "c.toml").write_text('[model]\npath = "somewhere"\n')
    assert load_config(tmp_path / "c.toml").environments == []
