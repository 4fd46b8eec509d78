"""Configs of earlier versions are translated, and the warning shows the text that takes the old one's place."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest

from fiberpo_megatron.config import Config, ConfigError, load_config
from fiberpo_megatron.plugins import check_options, find, import_path

OLD = """
[model]
path = "somewhere"

[data]
max_prompt_tokens = 64

[[data.tasks]]
kind = "addition"
digits = 3

[[data.tasks]]
kind = "sort"
name = "sorting"
length = 4
weight = 2.0

[[data.tasks]]
kind = "jsonl"
name = "problems"
train = "train.jsonl"
held_out = "test.jsonl"
reward = "math_verify"
chat_template_kwargs = {enable_thinking = false}
max_turns = 2

[rollouts]
dump = true
"""
NEW = """
[model]
path = "somewhere"

[data]
max_prompt_tokens = 64

[storage]
dump = true

[algorithm]
preset = "paper"

[[environments]]
name = "addition"
use = "examples.demo.environments:Addition"
options = {digits = 3}

[[environments]]
name = "sorting"
use = "examples.demo.environments:Sort"
weight = 2.0
options = {length = 4}

[[environments]]
name = "problems"
use = "math"

[environments.options]
train = "train.jsonl"
held_out = "test.jsonl"
chat_template_kwargs = {enable_thinking = false}
max_turns = 2
name = "problems"
"""


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "c.toml"
    path.write_text(text)
    return load_config(path, overrides)


def test_old_names_are_the_new_config_and_the_warning_shows_it(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"c\.toml was written for an earlier version; write today") as found:
        config = load(tmp_path, OLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, NEW) == config
    (warning,) = found
    shown = str(warning.message).partition("\n\n")[2]
    rest = {name: section for name, section in tomllib.loads(NEW).items() if name in ("model", "data")}
    assert Config.model_validate(rest | tomllib.loads(shown)) == config, "the shown text is what to write"
    assert tomllib.loads(shown).keys() == {"storage", "environments", "algorithm"}


def test_what_is_translated_exists(tmp_path: Path):
    """The classes are found and take the options that the old tasks had."""
    with pytest.warns(UserWarning):
        config = load(tmp_path, OLD)
    for environment in config.environments:
        plugin = find("environments", environment.use, "use")
        check_options(plugin, environment.options, "options")
        assert import_path("environments", environment.use, "use") == plugin.path


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ('use = "jsonl"\noptions = {train = "a"}', {"use": "chat", "options": {"train": "a", "name": "jsonl"}}),
        (
            'use = "jsonl"\noptions = {train = "a", reward = "math_verify", name = "n"}',
            {"use": "math", "options": {"train": "a", "name": "n"}},
        ),
        (
            'use = "fiberpo_megatron.environments.jsonl:Jsonl"\noptions = {train = "a", reward = "exact"}',
            {"use": "chat", "options": {"train": "a", "reward": "exact", "name": "jsonl"}},
        ),
    ],
)
def test_the_environment_jsonl_is_chat_or_math(tmp_path: Path, written: str, means: dict[str, object]):
    """Its default name decided the order of the held-out problems, so that it is written out."""
    with pytest.warns(UserWarning) as found:
        config = load(tmp_path, f'[model]\npath = "x"\n[[environments]]\nname = "e"\n{written}\n')
    (entry,) = config.environments
    assert {"use": entry.use, "options": entry.options} == means
    assert config.algorithm.preset == "recommended", "the name says nothing about the preset"
    shown = tomllib.loads(str(found[0].message).partition("\n\n")[2])
    assert shown == {"environments": [{"name": "e", **means}]}


def test_only_what_was_used_is_shown(tmp_path: Path):
    text = '[model]\npath = "x"\n[rollouts]\ndump = true\n[[environments]]\nname = "a"\nuse = "x:A"\n'
    with pytest.warns(UserWarning) as found:
        config = load(tmp_path, text)
    assert config.storage.dump and "environments" not in str(found[0].message).partition("\n\n")[2]


@pytest.mark.parametrize(
    "written",
    [
        'objective = "apc"\nbudgets = {trajectory = [0.2, 0.1]}',
        'objective = {use = "apc", options = {budgets = {trajectory = [0.2, 0.1]}}}',
    ],
)
def test_a_budget_of_trajectories_belongs_to_what_apc_was(tmp_path: Path, written: str):
    rest = '[model]\npath = "x"\n[[environments]]\nname = "a"\nuse = "x:A"\n'
    with pytest.warns(UserWarning, match="apc-trajectory"):
        config = load(tmp_path, f"{rest}[algorithm]\n{written}\n")
    assert config.algorithm.objective.use == "apc-trajectory"
    assert list(config.algorithm.objective_options([])["budgets"]) == ["trajectory"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, f'{rest}[algorithm]\nobjective = "apc"\n').algorithm.objective.use == "apc"


WRITTEN_OUT = """
[model]
path = "x"
[algorithm]
objective = {objective}
unclip_positive = false
advantage = "group-mean"
normalise_std = true
expert_routing = "old"
routing_replay = "none"
"""


@pytest.mark.parametrize(
    ("objective", "preset"),
    [
        ("fiberpo-expert", "paper"),
        ("fiberpo_megatron.fibration.fiber:FiberPO", "paper"),
        ("grpo", "recommended"),  # has no preset, so that nothing need be written
        ("mine:Objective", "recommended"),
    ],
)
def test_what_a_run_without_presets_wrote_out_means_the_bare_form(tmp_path: Path, objective: str, preset: str):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        config = load(tmp_path, WRITTEN_OUT.format(objective=f'"{objective}"'))
        assert config.algorithm.preset == preset
    assert len(found) == (preset == "paper")
    if found:
        shown = tomllib.loads(str(found[0].message).partition("\n\n")[2])
        assert shown == {"algorithm": {"preset": "paper"}}
        assert Path(found[0].filename) == Path(__file__), "the warning is at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = f'{WRITTEN_OUT.format(objective=repr(objective))}preset = "recommended"\n'
        assert load(tmp_path, written).algorithm.preset == "recommended"
        fresh = f'[model]\npath = "x"\n[algorithm]\nobjective = "{objective}"\n'
        assert load(tmp_path, fresh).algorithm.preset == "recommended", "a new config"


def test_overrides_of_old_configs_take_the_old_names(tmp_path: Path):
    with pytest.warns(UserWarning):
        config = load(tmp_path, OLD, "--data.tasks.0.digits", "1", "--rollouts.dump", "false")
    assert config.environments[0].options == {"digits": 1} and not config.storage.dump


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{OLD}[storage]\ndump = false\n", "[rollouts] is the old name of [storage]; keep [storage] alone"),
        (
            f'{OLD}[[environments]]\nname = "a"\nuse = "x:A"\n',
            "data.tasks is the old name of [[environments]]; keep [[environments]] alone",
        ),
        (
            OLD.replace('kind = "sort"', 'kind = "sorts"'),
            "has no `kind` among addition, sort, jsonl; write it as an entry of [[environments]]",
        ),
        (OLD.replace('kind = "sort"', ""), "has no `kind` among addition, sort, jsonl"),
        ('[model]\npath = "x"\n[data]\ntasks = "addition"\n', "data.tasks: 'addition' has no `kind`"),
    ],
)
def test_a_mixture_of_old_and_new_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=rf"c\.toml: .*{re.escape(message)}"):
        load(tmp_path, text)


def test_the_key_of_weight_versions_has_its_new_name(tmp_path: Path):
    levels = '[["trajectory", "weight_version"], ["weight_version"]]'
    budgets = '{"trajectory+weight_version" = {by = "weight_version", "*" = [0.2, 0.1]}, weight_version = [0.2, 0.1]}'
    head = '[model]\npath = "x"\n[algorithm]\n'
    flat = f"{head}levels = {levels}\nbudgets = {budgets}\n"
    table = f'{head}objective = {{use = "fiberpo", options = {{levels = {levels}, budgets = {budgets}}}}}\n'
    for old in (flat, table):
        new = old.replace("weight_version", "version")
        with pytest.warns(UserWarning, match=r"write today:\n\n\[algorithm") as found:
            config = load(tmp_path, old)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(tmp_path, new) == config
        shown = str(found[0].message).partition("write today")[2]
        assert "weight_version" not in shown and config.algorithm.preset == "recommended"
