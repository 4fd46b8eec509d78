"""This module finds and checks the plug-ins of a config before anything starts, and records them with the run."""

import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.environments.host import describe
from fiberpo_megatron.fibration import OBJECTIVES, FiberPO, Objective, build_objective
from fiberpo_megatron.fibration.presets import preset_options
from fiberpo_megatron.interfaces import AdvantageEstimator
from fiberpo_megatron.plugins import BUILT_IN, Plugin, check_options, check_version, find
from fiberpo_megatron.printable import printable
from fiberpo_megatron.settings import PluginConfig
from fiberpo_megatron.trainer.batch import SUPPLIED_KEYS
from fiberpo_megatron.trainer.settings import AlgorithmConfig
from fiberpo_megatron.user_warnings import nowhere, warnings_to


def make_objective(config: Config) -> Objective:
    """Return the objective of [algorithm].

    Raises ConfigError, also where its levels need what no run supplies, or its budgets and branches list what the run
    does not have.
    """
    algorithm = config.algorithm
    try:
        with warnings_to(nowhere):  # `advice` gives them, once a run
            options = algorithm.objective_options([environment.name for environment in config.environments])
            use, kernels, exact = algorithm.objective.use, algorithm.kernels, algorithm.exact_sums
            objective = build_objective(use, kernels=kernels, exact_sums=exact, **options)
        objective.check_keys((*SUPPLIED_KEYS, "expert"))
        if isinstance(objective, FiberPO):
            _check_listed(config, objective)
    except ValueError as error:
        raise ConfigError(f"[algorithm]: {error}") from error
    return objective


def advice(config: Config) -> list[str]:
    """Return what in the objective's settings is allowed but unwise, or not what its paper has, one line each, which
    begins with the setting."""
    algorithm, objective = config.algorithm, make_objective(config)
    given = algorithm.objective_options([environment.name for environment in config.environments])
    del given["preset"]
    lines = _departures(config, objective)
    for it in objective.advice(given):
        section = "algorithm.objective.options" if it.option in algorithm.objective.options else "algorithm"
        entry = "" if it.entry is None else f".{it.entry if it.entry.isidentifier() else json.dumps(it.entry)}"
        lines.append(f"{section}.{it.option}{entry} = {json.dumps(it.seen)}: {it.text}")
    return lines


def _departures(config: Config, objective: Objective) -> list[str]:
    """Name the settings that override the token weights or the advantage of the objective's paper."""
    algorithm = config.algorithm
    lines: list[str] = []
    if objective.paper is None:
        return lines
    paper = f"the paper of {objective.name} ({objective.paper})"
    if algorithm.weighting not in (None, objective.weighting):
        lines.append(f'algorithm.weighting = "{algorithm.weighting}": {paper} has "{objective.weighting}"')
    use = advantage_config(config, objective).use
    if objective.advantage is not None and use != objective.advantage:
        lines.append(f'algorithm.advantage = "{use}": {paper} has "{objective.advantage}"')
    elif objective.normalise_std is not None and algorithm.normalise_std not in (None, objective.normalise_std):
        divides = "divides" if objective.normalise_std else "does not divide"
        std = str(algorithm.normalise_std).lower()
        lines.append(f"algorithm.normalise_std = {std}: {paper} {divides} by the group's standard deviation")
    return lines


def with_recorded_recipe(config: Config, resume: bool) -> Config:
    """Return the config of a run that goes on with what its config.toml records: the preset with its numbers, and the
    token weights and advantages that the objective chose.

    A run of a version without presets goes on with the bare form. A preset "paper", `algorithm.preset_options`, and
    weights and advantages that the config sets stay as they are.
    """
    algorithm = config.algorithm
    if not resume:
        return config
    try:
        made = tomllib.loads((config.run.folder / "config.toml").read_text()).get("algorithm", {})
    except FileNotFoundError:
        return config
    kept = {}
    if algorithm.preset != "paper" and algorithm.preset_options is None:
        kept = {"preset": made.get("preset", "paper"), "preset_options": made.get("preset_options")}
    objective = made.get("objective")
    if (objective.get("use") if isinstance(objective, dict) else objective) == algorithm.objective.use:
        names = ("weighting", "normaliser", *(("advantage", "normalise_std") if algorithm.advantage is None else ()))
        kept |= {name: made[name] for name in names if name in made and getattr(algorithm, name) is None}
    return config.model_copy(update={"algorithm": AlgorithmConfig.model_validate(algorithm.model_dump() | kept)})


def _check_listed(config: Config, objective: FiberPO) -> None:
    """Refuse budgets and branches of what a run does not have, or numbers afresh in each mini-batch."""
    engine = config.rollout.engine
    counts = {
        "domain": len(config.environments),
        "expert": config.algorithm.expert_partitions or config.parallel.expert,
        "engine": len(engine.urls) or engine.count,
    }
    for key, listed in objective.tree.listed().items():
        if key not in (*counts, "turn", "version"):
            raise ValueError(
                f"budgets or levels go by {key!r}, whose ids mean another {key} in each mini-batch; choose one of the "
                "keys domain, turn, version, engine and expert"
            )
        if key in counts and listed and max(listed) >= counts[key]:
            raise ValueError(
                f"budgets or levels list {key} {max(listed)}, but the run has {key} 0 to {counts[key] - 1}"
            )
    choice = objective.branch_choice
    if choice is not None and choice.others is None:
        missing = [it.name for at, it in enumerate(config.environments) if at not in choice.of_id]
        if choice.key != "domain" or missing:
            raise ValueError(
                f"levels by {choice.key!r} has no chain for {missing[0] if choice.key == 'domain' else 'all others'}; "
                'add one, or "*" for all that are not listed'
            )


def advantage_config(config: Config, objective: Objective) -> PluginConfig:
    """Return the advantage estimator that the config names, or else the one that the objective's paper has."""
    return config.algorithm.advantage or PluginConfig(use=objective.advantage or "group-mean")


def make_advantage(config: Config, objective: Objective) -> AdvantageEstimator:
    """Return the advantage estimator of [algorithm]. Raises ConfigError."""
    chosen, std = advantage_config(config, objective), config.algorithm.normalise_std
    setting = "algorithm.advantage"
    try:
        plugin = find("advantages", chosen.use, setting)
        options = dict(chosen.options)
        if chosen.use in BUILT_IN["advantages"]:
            if std is None and chosen.use == (objective.advantage or "group-mean"):
                std = objective.normalise_std
            if std is not None:
                options = {"normalise_std": std} | options
        check_options(plugin, options, setting)
        estimator: AdvantageEstimator = plugin.target(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"[algorithm]: {error}") from error
    if not callable(estimator):
        raise ConfigError(f"{setting}: {plugin.path} cannot be called; define __call__(self, rollouts)")
    return estimator


def check_plugins(config: Config, resume: bool, environments: bool = True) -> None:
    """Raise ConfigError, with the cause and the fix, for a plug-in that cannot be used.

    The classes of objective, advantage, optimizer, publisher and sinks are imported here; each environment is started
    once in a worker, which its own interpreter may run. With `resume` the versions must be those that the run recorded.
    Without `environments` (on a login node) their workers are left out.
    """
    from fiberpo_megatron.mcore.optimizers.choose import check_optimizer
    from fiberpo_megatron.telemetry.alarms.announce import check_alarms
    from fiberpo_megatron.telemetry.sinks import check_sinks
    from fiberpo_megatron.weight_sync.choose import check_publisher

    make_advantage(config, make_objective(config))
    if not config.environments:
        raise ConfigError("there are no environments; add [[environments]] with `name` and `use` to the config")
    try:
        check_optimizer(config)
        check_publisher(config)
        check_sinks(config)
        check_alarms(config)
        found = {setting: find(kind, plugin.use, setting) for setting, kind, plugin in _imported(config)}
        recorded = _recorded_versions(config.run.folder) if resume else {}
        for setting, _, plugin in _imported(config):
            check_version(found[setting], recorded.get(setting) or plugin.version, setting)
        for environment in config.environments if environments else ():
            setting = f"environments.{environment.name}"
            version = environment.version or recorded.get(setting)
            described = describe(environment.model_copy(update={"version": None}))
            check_version(Plugin(described.path, None, described.version), version, setting)
            if described.about:
                print(printable(f"fiberpo: environment {environment.name}: {described.about}"), file=sys.stderr)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def recorded(config: Config, environments: Sequence[tuple[str, str | None]]) -> Config:
    """Return the config with the import path and version of every plug-in that is not this package's own.

    The token weights and the advantage that the objective chooses, the options that its preset gives, and the method of
    importance weights that the staleness chooses are written out as well.
    `environments`: (import path, version) of each environment, as its worker said them.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    objective, algorithm = make_objective(config), values["algorithm"]
    algorithm.setdefault("weighting", objective.weighting)
    if algorithm["weighting"] == "constant":
        algorithm.setdefault("normaliser", config.rollout.max_response_tokens)
    algorithm["importance"]["method"] = config.algorithm.importance.method_at(config.rollout.staleness)
    chosen = advantage_config(config, objective)
    algorithm.setdefault("advantage", chosen.model_dump(mode="json", exclude_none=True))
    std = getattr(make_advantage(config, objective), "normalise_std", None)
    if chosen.use in BUILT_IN["advantages"] and std is not None and "normalise_std" not in chosen.options:
        algorithm.setdefault("normalise_std", std)
    options = preset_options(type(objective), config.algorithm.objective_options([])["preset"])
    if options:
        algorithm["preset_options"] = json.loads(json.dumps(options))
    for values_of, (path, version) in zip(values["environments"], environments):
        if not path.startswith("fiberpo_megatron."):
            values_of |= {"use": path} | ({"version": version} if version else {})
    for setting, kind, plugin in _imported(config):
        found = find(kind, plugin.use, setting)
        if found.path.startswith("fiberpo_megatron."):
            continue
        table = {"use": found.path, "options": plugin.options} | ({"version": found.version} if found.version else {})
        *sections, key = setting.split(".")
        target: Any = values  # sections and lists in one another
        for section in sections:
            target = target[section]
        target[int(key) if key.isdigit() else key] = table
    return Config.model_validate(values)


def _imported(config: Config) -> Iterator[tuple[str, str, PluginConfig]]:
    """(setting, kind, plug-in) of all that are imported into the ranks, the built-in objectives apart."""
    objective = config.algorithm.objective
    if objective.use not in OBJECTIVES:
        yield "algorithm.objective", "objectives", objective
    yield "algorithm.advantage", "advantages", config.algorithm.advantage or PluginConfig(use="group-mean")
    yield "optimizer.kind", "optimizers", config.optimizer.kind
    yield "weight_sync.method", "publishers", config.weight_sync.method
    for number, sink in enumerate(config.telemetry.sinks):
        yield f"telemetry.sinks.{number}", "sinks", sink
    for number, rule in enumerate(config.telemetry.alarms.own):
        yield f"telemetry.alarms.own.{number}", "alarms", rule


def _recorded_versions(folder: Path) -> dict[str, str]:
    """Versions by setting in the config.toml of a run folder; none when it has no such file."""
    found: dict[str, str] = {}
    with suppress(FileNotFoundError):
        values = tomllib.loads((folder / "config.toml").read_text())
        for environment in values.get("environments", []):
            if "version" in environment:
                found[f"environments.{environment['name']}"] = environment["version"]
        for section, keys in (
            ("algorithm", ("objective", "advantage")),
            ("optimizer", ("kind",)),
            ("weight_sync", ("method",)),
        ):
            for key in keys:
                value = values.get(section, {}).get(key)
                if isinstance(value, dict) and "version" in value:
                    found[f"{section}.{key}"] = value["version"]
        telemetry = values.get("telemetry", {})
        for name, listed in (("sinks", telemetry.get("sinks")), ("alarms.own", telemetry.get("alarms", {}).get("own"))):
            for number, plugin in enumerate(listed or []):
                if isinstance(plugin, dict) and "version" in plugin:
                    found[f"telemetry.{name}.{number}"] = plugin["version"]
    return found
