"""This module translates configs that were written for earlier versions, with a warning that shows the new text."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fiberpo_megatron.user_warnings import warn_user

DEMO = "examples.demo.environments"
"""Where the built-in tasks of earlier versions live now."""
_TASK_CLASSES = {"addition": f"{DEMO}:Addition", "sort": f"{DEMO}:Sort", "jsonl": "jsonl"}
PROMPT_FILES = ("jsonl", "fiberpo_megatron.environments.jsonl:Jsonl")
"""What earlier versions called the environment `chat`, and `math` where its reward was "math_verify"."""
TRAJECTORY_APC = "apc-trajectory"
"""What earlier versions called apc; today's apc couples the samples of a state."""
WITH_PRESET = ("fiberpo", "fiberpo-domain", "fiberpo-expert", "fiberpo-expert-global")
"""Objectives for which a config without `algorithm.preset` meant the bare form in earlier versions."""
_WRITTEN_OUT = {"objective", "advantage", "normalise_std", "expert_routing", "routing_replay"}
_ALL = ("kind", "name", "weight")
VERSION_KEY = "weight_version"
"""What earlier versions called the key `version` of levels."""


def translated(values: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """Return the config's values under today's names; a warning to the user shows the text that takes the old one's
    place.

    Raises ValueError when a section stands under its old and its new name.
    """
    values = dict(values)
    new: dict[str, Any] = {}
    if "rollouts" in values:
        if "storage" in values:
            raise ValueError("[rollouts] is the old name of [storage]; keep [storage] alone")
        new["storage"] = values["storage"] = values.pop("rollouts")
    data = values.get("data")
    if isinstance(data, Mapping) and "tasks" in data:
        if "environments" in values:
            raise ValueError("data.tasks is the old name of [[environments]]; keep [[environments]] alone")
        values["data"] = {key: value for key, value in data.items() if key != "tasks"}
        tasks = data["tasks"] if isinstance(data["tasks"], list) else [data["tasks"]]
        new["environments"] = values["environments"] = [_environment(task) for task in tasks]
    algorithm = values.get("algorithm")
    if isinstance(algorithm, Mapping) and _bounds_trajectories(algorithm):
        objective = algorithm["objective"]
        apc = {**objective, "use": TRAJECTORY_APC} if isinstance(objective, Mapping) else TRAJECTORY_APC
        new["algorithm"] = {"objective": apc}
        values["algorithm"] = {**algorithm, "objective": apc}
    algorithm = values.get("algorithm", {})
    if isinstance(algorithm, Mapping) and "preset" not in algorithm and _meant_the_paper(algorithm, bool(new)):
        new["algorithm"] = {**new.get("algorithm", {}), "preset": "paper"}
        values["algorithm"] = {**algorithm, "preset": "paper"}
    algorithm = values.get("algorithm", {})
    if isinstance(algorithm, Mapping):
        changed = _by_version(algorithm)
        if changed:
            new["algorithm"] = {**new.get("algorithm", {}), **changed}
            values["algorithm"] = {**algorithm, **changed}
    environments = values.get("environments")
    if isinstance(environments, list) and any(map(_uses_prompt_files, environments)):
        entries = [_prompt_files(entry) if _uses_prompt_files(entry) else entry for entry in environments]
        new["environments"] = values["environments"] = entries
    if new:
        warn_user(f"{source} was written for an earlier version; write today:\n\n{tomli_w.dumps(_writable(new))}")
    return values


def _meant_the_paper(algorithm: Mapping[str, Any], earlier: bool) -> bool:
    """Whether these settings were written before there were presets, for an objective that has one today: with names of
    that time (`earlier`), or by a run, which wrote out all of its settings."""
    objective = algorithm.get("objective", "fiberpo")
    use = objective.get("use") if isinstance(objective, Mapping) else objective
    fibred = isinstance(use, str) and (use in WITH_PRESET or use.startswith("fiberpo_megatron."))
    return fibred and (earlier or algorithm.keys() >= _WRITTEN_OUT)


def _bounds_trajectories(algorithm: Mapping[str, Any]) -> bool:
    """Whether the objective is the one that earlier versions called apc: it has a budget for trajectories."""
    objective = algorithm.get("objective")
    table = objective if isinstance(objective, Mapping) else {"use": objective}
    options = table.get("options")
    budgets = (algorithm.get("budgets"), options.get("budgets") if isinstance(options, Mapping) else None)
    return table.get("use") == "apc" and any(isinstance(given, Mapping) and "trajectory" in given for given in budgets)


def _by_version(algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings that name the key of weight versions in levels or budgets, with today's name."""
    found = {name: algorithm[name] for name in ("levels", "budgets") if name in algorithm}
    objective = algorithm.get("objective")
    options = objective.get("options") if isinstance(objective, Mapping) else None
    if isinstance(objective, Mapping) and isinstance(options, Mapping):
        own = {name: _with_version(options[name]) for name in ("levels", "budgets") if name in options}
        found["objective"] = {**objective, "options": {**options, **own}}
    renamed = {name: value if name == "objective" else _with_version(value) for name, value in found.items()}
    return {name: value for name, value in renamed.items() if value != algorithm[name]}


def _with_version(value: Any) -> Any:
    """Return levels or budgets with today's name of the key, in lists, in names of levels and as what a table goes
    by."""
    if isinstance(value, Mapping):
        return {_with_version(name): _with_version(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_version(item) for item in value]
    return re.sub(rf"(?<!\w){VERSION_KEY}(?!\w)", "version", value) if isinstance(value, str) else value


def _environment(task: Any) -> Any:
    """An entry of data.tasks as one of [[environments]]."""
    if not isinstance(task, Mapping) or task.get("kind") not in _TASK_CLASSES:
        kinds = ", ".join(_TASK_CLASSES)
        raise ValueError(f"data.tasks: {task!r} has no `kind` among {kinds}; write it as an entry of [[environments]]")
    kind = task["kind"]
    name = task.get("name", kind)
    options = {key: value for key, value in task.items() if key not in _ALL}
    if kind == "jsonl":
        options["name"] = name
    weight = {"weight": task["weight"]} if "weight" in task else {}
    return {"name": name, "use": _TASK_CLASSES[kind], **weight, "options": options}


def _uses_prompt_files(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("use") in PROMPT_FILES


def _prompt_files(entry: Mapping[str, Any]) -> Any:
    """An environment of the earlier name `jsonl` as one of `chat` or `math`."""
    options = dict(entry.get("options", {}))
    options.setdefault("name", "jsonl")  # the earlier default, by which held-out problems were ordered
    use = "chat"
    if options.get("reward") == "math_verify":
        use = "math"
        del options["reward"]
    return {**entry, "use": use, "options": options}


def _writable(value: Any) -> Any:
    """The value with paths as text, for TOML."""
    if isinstance(value, Mapping):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_writable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
