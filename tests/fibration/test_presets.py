"""The preset "recommended" lies below a user's options. Its numbers are a study's and change: no test names one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from fiberpo_megatron.fibration import DEFAULT_BUDGETS, OBJECTIVES, PRESET_LEVELS, FiberPO, build_objective, presets
from fiberpo_megatron.fibration.levels import level_name

FIBRED = tuple(PRESET_LEVELS)
NUMBERS = {
    "pessimistic": True,
    "epsilon": 0.3,
    "k_max": 7,
    "budgets": {"trajectory": (0.9, 0.8), "turn": (0.7, 0.6)},
}


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """Other numbers than those of this version."""
    monkeypatch.setattr(presets, "RECOMMENDED", dict.fromkeys(FIBRED, NUMBERS))
    return NUMBERS


@pytest.mark.parametrize("name", FIBRED)
def test_without_a_preset_an_objective_is_the_bare_form(name: str) -> None:
    bare = build_objective(name)
    assert build_objective(name, preset="paper") == bare and type(bare)() == bare
    assert build_objective(name, preset="recommended") != bare
    assert not bare.pessimistic and bare.k_max is None and bare.budgets is None


@pytest.mark.parametrize("name", FIBRED)
def test_the_recommended_numbers_suit_their_objective(name: str) -> None:
    """They are options of the class, with a budget for each level, and no user is warned of what he did not choose."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = build_objective(name, preset="recommended")
    for option, value in presets.RECOMMENDED[name].items():
        if option != "budgets":
            assert getattr(built, option) == value
    for level in built.tree.levels:
        assert level.budget.others == presets.RECOMMENDED[name]["budgets"][level_name(level.keys)]
    assert DEFAULT_BUDGETS.keys() <= presets.RECOMMENDED[name]["budgets"].keys(), "a record is complete"


def test_a_preset_gives_what_the_user_does_not(numbers: Mapping[str, Any]) -> None:
    built = build_objective("fiberpo-domain", preset="recommended", epsilon=0.01, pessimistic=False)
    assert (built.epsilon, built.pessimistic, built.k_max) == (0.01, False, 7)
    own = {"domain": (0.5, 0.4)}
    built = build_objective("fiberpo-domain", preset="recommended", budgets=own)
    found = {level.name: level.budget.others for level in built.tree.levels}
    assert found == {"trajectory": (0.9, 0.8), "prompt_group": DEFAULT_BUDGETS["prompt_group"], "domain": (0.5, 0.4)}
    assert own == {"domain": (0.5, 0.4)}


def test_levels_of_the_users_take_the_presets_budgets_by_their_keys(numbers: Mapping[str, Any]) -> None:
    levels = {"by": "domain", "*": [["trajectory"], ["domain"]], 1: [["turn"], ["trajectory"], ["domain"]]}
    built = build_objective("fiberpo", preset="recommended", levels=levels)
    found = {level.name: level.budget.others for level in built.tree.levels}
    assert found == {"1:turn": (0.7, 0.6), "trajectory": (0.9, 0.8), "domain": DEFAULT_BUDGETS["domain"]}
    with pytest.raises(ValueError, match="level 'engine' has no budget; add budgets"):
        build_objective("fiberpo", preset="recommended", levels=[["engine"]])
    by_node = {"turn": {"by": "trajectory", 3: (2, 1)}}  # what is not listed: the preset's
    built = build_objective("fiberpo", preset="recommended", levels=[["turn"], ["trajectory"]], budgets=by_node)
    assert built.tree.levels[0].budget.others == (0.7, 0.6) and built.tree.levels[0].budget.of_id == {3: (2.0, 1.0)}


@pytest.mark.parametrize(("mine", "other"), [("unclip_positive", "pessimistic"), ("pessimistic", "unclip_positive")])
def test_an_option_that_excludes_the_presets_names_it(mine: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "RECOMMENDED", {"fiberpo": {other: True}})
    message = f"`{mine}` is set, but the preset 'recommended' sets `{other}`, which excludes it; set {other} = false"
    with pytest.raises(ValueError, match=message):
        build_objective("fiberpo", preset="recommended", **{mine: True})
    built = build_objective("fiberpo", preset="recommended", **{mine: True, other: False})
    assert getattr(built, mine) and not getattr(built, other)
    assert getattr(build_objective("fiberpo", preset="recommended", **{mine: False}), other)


@dataclass(frozen=True)
class Mine(FiberPO):
    """Is a user's own variant, with a default of its own."""

    epsilon: float = 0.07
    name = "fiberpo"


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in FIBRED] + [Mine])
def test_other_objectives_have_no_preset(objective: Any) -> None:
    for preset in ("recommended", "paper", {"pessimistic": True}):
        assert build_objective(objective, preset=preset) == build_objective(objective)


def test_options_that_a_run_recorded_take_the_place_of_todays(numbers: Mapping[str, Any]) -> None:
    built = build_objective("fiberpo", preset={"epsilon": 0.04, "budgets": {"trajectory": [0.2, 0.1]}})
    assert built.epsilon == 0.04 and not built.pessimistic and built.k_max is None
    assert built.tree.levels[0].budget.others == (0.2, 0.1)
    with pytest.raises(ValueError, match="objective 'fiberpo' does not read 'newer'"):
        build_objective("fiberpo", preset={"newer": 1.0})


def test_refused_presets() -> None:
    with pytest.raises(ValueError, match="preset is 'best'; choose 'recommended' or 'paper'"):
        build_objective("grpo", preset="best")
    with pytest.raises(ValueError, match="already built and takes no options; give preset to its constructor"):
        build_objective(FiberPO(), preset="recommended")
    for options in ({"levels": 5}, {"budgets": "wide"}, {"names": 3, "levels": [["domain"]]}):
        with pytest.raises(ValueError, match=f"option '{next(iter(options))}' is"):
            build_objective("fiberpo", preset="recommended", **options)
