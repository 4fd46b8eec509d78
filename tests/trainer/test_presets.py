"""A run records the preset of its objective with the numbers, keeps them, and is warned of what the user chose only."""

import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.cli.main import main
from fiberpo_megatron.config import Config, ConfigError, dump_config, load_config
from fiberpo_megatron.fibration import FiberPO, build_objective, presets
from fiberpo_megatron.trainer.given import with_given
from fiberpo_megatron.trainer.plugin_checks import advice, make_objective, recorded, with_recorded_recipe

FIBRED = ("fiberpo", "fiberpo-domain", "fiberpo-expert", "fiberpo-expert-global")
THEN = {"pessimistic": True, "epsilon": 0.3, "budgets": {"trajectory": (0.9, 0.8), "domain": (0.7, 0.6)}}
LATER = {"epsilon": 0.01, "k_max": 3.0, "budgets": {"trajectory": (0.4, 0.3), "domain": (0.3, 0.2)}}


@pytest.fixture(autouse=True)
def then(monkeypatch: pytest.MonkeyPatch) -> None:
    recommend(monkeypatch, THEN)


def recommend(monkeypatch: pytest.MonkeyPatch, numbers: dict[str, Any]) -> None:
    monkeypatch.setattr(presets, "RECOMMENDED", dict.fromkeys(FIBRED, numbers))


def config(folder: Path, objective: str = "fiberpo", **algorithm: Any) -> Config:
    values = {"model": {"path": folder}, "run": {"folder": folder}, "algorithm": {"objective": objective, **algorithm}}
    return Config.model_validate(values)


def begin(given: Config) -> Path:
    """Write the config.toml of a run."""
    path = given.run.folder / "config.toml"
    path.write_text(dump_config(recorded(given, [])))
    return path


def test_the_default_is_the_recommended_preset(tmp_path: Path):
    assert make_objective(config(tmp_path)) == build_objective("fiberpo", preset="recommended")
    assert make_objective(config(tmp_path, preset="paper")) == FiberPO()
    assert make_objective(config(tmp_path, "grpo")) == build_objective("grpo")
    own = make_objective(config(tmp_path, epsilon=0.04, pessimistic=False, budgets={"trajectory": [0.2, 0.1]}))
    assert (own.epsilon, own.pessimistic, own.tree.levels[0].budget.others) == (0.04, False, (0.2, 0.1))


def test_config_toml_names_the_preset_and_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever reads it sees them, and a later version repeats the run from it."""
    given = config(tmp_path, "fiberpo-domain", epsilon=0.05)
    path = begin(given)
    shown = tomllib.loads(path.read_text())["algorithm"]
    assert shown["preset"] == "recommended" and shown["epsilon"] == 0.05
    assert shown["preset_options"] == {
        "pessimistic": True,
        "epsilon": 0.3,
        "budgets": {"trajectory": [0.9, 0.8], "domain": [0.7, 0.6]},
    }
    before = make_objective(given)
    recommend(monkeypatch, LATER)
    assert make_objective(load_config(path)) == before != make_objective(given)
    assert make_objective(load_config(path, ["--algorithm.preset", "paper"])).pessimistic is False
    assert make_objective(load_config(path, ["--algorithm.objective", "grpo"])) == build_objective("grpo", epsilon=0.05)


@pytest.mark.parametrize("algorithm", [{"preset": "paper"}, {"objective": "grpo"}])
def test_without_numbers_of_a_preset_none_are_recorded(tmp_path: Path, algorithm: dict[str, str]):
    shown = tomllib.loads(begin(config(tmp_path, **algorithm)).read_text())["algorithm"]
    assert shown["preset"] == algorithm.get("preset", "recommended") and "preset_options" not in shown


def test_a_resumed_run_keeps_its_preset_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Other options may change, as ever; another version's numbers do not come in."""
    given = config(tmp_path, "fiberpo-domain")
    begin(given)
    before = make_objective(given)
    recommend(monkeypatch, LATER)
    resumed = with_recorded_recipe(given, resume=True)
    assert make_objective(resumed) == before
    assert make_objective(with_recorded_recipe(given, resume=False)) != before
    begin(resumed)  # as every start writes it
    assert make_objective(with_recorded_recipe(given, resume=True)) == before
    changed = make_objective(with_recorded_recipe(config(tmp_path, "fiberpo-domain", dual_clip=3.0), resume=True))
    assert (changed.dual_clip, changed.epsilon, changed.k_max) == (3.0, 0.3, None)
    bare = config(tmp_path, "fiberpo-domain", preset="paper")
    assert make_objective(with_recorded_recipe(bare, resume=True)).pessimistic is False


def test_a_resumed_run_of_a_version_without_presets_keeps_the_bare_form(tmp_path: Path):
    given = config(tmp_path)
    text = begin(config(tmp_path, preset="paper")).read_text()
    (tmp_path / "config.toml").write_text(text.replace('preset = "paper"\n', ""))
    assert make_objective(with_recorded_recipe(given, resume=True)) == FiberPO()
    begin(with_recorded_recipe(given, resume=True))
    assert make_objective(with_recorded_recipe(given, resume=True)) == FiberPO()


def test_a_resume_before_anything_was_written_takes_todays(tmp_path: Path):
    assert with_recorded_recipe(config(tmp_path), resume=True) == config(tmp_path)


def test_an_object_is_complete_and_a_class_takes_the_preset(tmp_path: Path):
    for objective in (FiberPO(), FiberPO(epsilon=0.02)):
        found = with_given(config(tmp_path, epsilon=0.4), objective=objective)
        assert make_objective(found) == objective
        assert make_objective(load_config(begin(found))) == objective
    assert make_objective(with_given(config(tmp_path), objective=FiberPO)) == make_objective(config(tmp_path))


def test_an_option_that_excludes_the_presets_is_one_error(tmp_path: Path):
    words = r"^\[algorithm\]: objective 'fiberpo': `unclip_positive` is set, but the preset 'recommended' sets"
    with pytest.raises(ConfigError, match=words):
        make_objective(config(tmp_path, unclip_positive=True))
    with pytest.raises(ConfigError, match=r"algorithm.preset is set and also an option of algorithm.objective"):
        make_objective(config(tmp_path, {"use": "fiberpo", "options": {"preset": "paper"}}))


# ---- warnings ----


def test_what_the_user_chose_is_one_line_by_its_setting(tmp_path: Path):
    assert advice(config(tmp_path)) == [], "nobody chose the numbers of the preset"
    assert advice(config(tmp_path, epsilon=0.9)) == [
        "algorithm.epsilon = 0.9: it is not well below delta = C_plus + C_minus of level 'trajectory' (1.7); lower it "
        "to at most half of delta, or raise the budgets"
    ]
    budgets = {"trajectory": [0.3, 0.4], "trajectory+expert": [0.9, 0.8]}
    found = advice(config(tmp_path, "fiberpo-expert", epsilon=0.01, budgets=budgets))
    assert [line.partition(":")[0] for line in found] == ["algorithm.budgets.trajectory = [0.3, 0.4]"]
    options = {"use": "fiberpo", "options": {"budgets": {"trajectory": [0.1, 0.09]}}}
    (line,) = advice(config(tmp_path, options))
    assert line.startswith("algorithm.objective.options.budgets.trajectory = [0.1, 0.09]: delta = C_plus + C_minus is")


def test_building_the_objective_of_a_config_warns_of_nothing(tmp_path: Path):
    """Every rank builds it, and the plan does; the checks before the start give the lines once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_objective(config(tmp_path, epsilon=0.9))


def test_the_command_prints_the_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Everything behind the checks is left out: no rank starts."""
    path = tmp_path / "c.toml"
    text = '[model]\npath = "x"\n[algorithm]\nepsilon = 0.9\n[[environments]]\nname = "a"\nuse = "x:A"\n'
    path.write_text(f'{text}[rollouts]\ndump = false\n[run]\nfolder = "{tmp_path}"\n')
    for check in ("_check_model", "_check_layout", "_check_fp8", "check_folder", "_check_rollouts", "_check_routing"):
        monkeypatch.setattr(f"fiberpo_megatron.trainer.preflight.{check}", lambda *_: None)
    for check in ("_check_keys", "_check_advantages", "check_plugins"):
        monkeypatch.setattr(f"fiberpo_megatron.trainer.preflight.{check}", lambda *_, **__: None)
    monkeypatch.setattr("fiberpo_megatron.cli.main.local_world_size", lambda _: 1)
    monkeypatch.setattr("fiberpo_megatron.cli.doctor.warn", lambda _: None)
    monkeypatch.setattr("fiberpo_megatron.launch.local.launch_ranks", lambda *_: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["train", str(path), "--algorithm.preset", "recommended"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"fiberpo: warning: {path} was written for an earlier version; write today:"
    (line,) = [line for line in said[1:] if "warning" in line.lower()]
    assert line.startswith("fiberpo: warning: algorithm.epsilon = 0.9: it is not well below delta")
