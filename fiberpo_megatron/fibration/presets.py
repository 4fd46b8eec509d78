"""Hold the options that are recommended for the fibred objectives, and lay them below those that a user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fiberpo_megatron.fibration.budgets import OTHERS
from fiberpo_megatron.fibration.levels import level_name, level_titles

PRESETS = ("recommended", "paper")

_DRIFT = (0.02, 0.015)
"""Budget of trajectories that examples/stability chose; it did not try other levels, which take the same."""

_FIBRED: Mapping[str, Any] = {
    # All five numbers are the choice of examples/stability over all its cells.
    "pessimistic": True,
    "dual_clip": 3.0,
    "epsilon": 0.02,
    "k_max": 16.0,
    "budgets": {
        "trajectory": _DRIFT,
        "trajectory+expert": _DRIFT,
        "prompt_group": _DRIFT,
        "prompt_group+expert": _DRIFT,
        "domain": _DRIFT,
        "domain+expert": _DRIFT,
        "expert": _DRIFT,
    },
}

RECOMMENDED: Mapping[str, Mapping[str, Any]] = {
    "fiberpo": _FIBRED,
    "fiberpo-domain": _FIBRED,
    "fiberpo-expert": _FIBRED,
    "fiberpo-expert-global": _FIBRED,
}
"""Options of the preset "recommended", by objective; budgets by the level's keys, joined by "+". An objective that is
not listed has no preset: "recommended" means its own defaults."""

_EXCLUSIVE = (("pessimistic", "unclip_positive"),)
"""Options of which an objective takes one."""


def preset_options(objective: type, preset: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options that a preset gives an objective's class; none for a class without a preset.

    `preset` is a name, or the options of "recommended" as a run recorded them. Raises ValueError for an unknown name.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; choose {' or '.join(map(repr, PRESETS))}")
    name = getattr(objective, "name", "")
    if preset == "paper" or name not in RECOMMENDED or not objective.__module__.startswith(__package__ or ""):
        return {}
    return RECOMMENDED[name] if isinstance(preset, str) else preset


def with_preset(objective: type, given: Mapping[str, Any], preset: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a user gave, and below them those of a preset.

    A level whose budget the user does not give takes the preset's, and so does an entry "*" that a table of budgets
    lacks. A level for which the preset has none takes the objective's own default.

    Args:
        objective: its class.
        given: the user's options.
        preset: as in `preset_options`.

    Raises ValueError where an option of the user excludes one of the preset.
    """
    table, name = preset_options(objective, preset), getattr(objective, "name", "")
    for pair in _EXCLUSIVE:
        for mine, other in (pair, pair[::-1]):
            if given.get(mine) and table.get(other) and other not in given:
                raise ValueError(
                    f"objective {name!r}: `{mine}` is set, but the preset 'recommended' sets `{other}`, which "
                    f"excludes it; set {other} = false as well, or choose the preset 'paper'"
                )
    options = {name: value for name, value in table.items() if name != "budgets"} | dict(given)
    if "budgets" in table:
        levels = options.get("levels", getattr(objective, "default_levels", None))
        names, budgets = options.get("names", {}), given.get("budgets", {})
        if isinstance(levels, list | tuple | Mapping) and isinstance(names, Mapping) and isinstance(budgets, Mapping):
            options["budgets"] = _below(budgets, table["budgets"], level_titles(levels, names))
    return options


def _below(
    given: Mapping[str, Any], recommended: Mapping[str, Any], titles: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    budgets = dict(given)
    for title, keys in titles.items():
        default = recommended.get(level_name(keys))
        own = budgets.get(title, {})
        if default is None or not isinstance(own, Mapping):
            continue
        budgets[title] = {OTHERS: default, **own} if title in budgets else default
    return budgets
