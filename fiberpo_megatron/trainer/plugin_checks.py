"""This module finds and checks the plug-ins of a config before anything starts, and records them with the run."""

import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.environments.host import describe
from fiberpo_megatron.fibration import OBJECTIVES, FiberPO, Objective, build_objective
from fiberpo_megatron.fibration.presets import preset_options
from fiberpo_megatron.interfaces import AdvantageEstimator
from fiberpo_megatron.plugins import BUILT_IN, Plugin, check_options, check_version, find
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
    """Return what in the objective's settings is allowed but unwise, one line each, which begins with the setting."""
    algorithm = config.algorithm
    given = algorithm.objective_options([environment.name for environment in config.environments])
    del given["preset"]
    lines = []
    for it in make_objective(config).advice(given):
        section = "algorithm.objective.options" if it.option in algorithm.objective.options else "algorithm"
        entry = "" if it.entry is None else f".{it.entry if it.entry.isidentifier() else json.dumps(it.entry)}"
        lines.append(f"{section}.{it.option}{entry} = {json.dumps(it.seen)}: {it.text}")
    return lines


def with_recorded_preset(config: Config, resume: bool) -> Config:
    """Return the config of a run that goes on with the preset, and its numbers, that its config.toml records.

    A run of a version without presets goes on with the bare form. A config with `algorithm.preset_options`, or with the
    preset "paper", stays as it is.
    """
    algorithm = config.algorithm
    if not resume or algorithm.preset == "paper" or algorithm.preset_options is not None:
        return config
    try:
        made = tomllib.loads((config.run.folder / "config.toml").read_text()).get("algorithm", {})
    except FileNotFoundError:
        return config
    kept = {"preset": made.get("preset", "paper"), "preset_options": made.get("preset_options")}
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
        if key not in (*counts, "turn", "weight_version"):
            raise ValueError(
                f"budgets or levels go by {key!r}, whose ids mean another {key} in each mini-batch; choose one of the "
                "keys domain, turn, weight_version, engine and expert"
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


def make_advantage(config: Config) -> AdvantageEstimator:
    """Return the advantage estimator of [algorithm]. Raises ConfigError."""
    algorithm = config.algorithm
    setting = "algorithm.advantage"
    try:
        plugin = find("advantages", algorithm.advantage.use, setting)
        options = dict(algorithm.advantage.options)
        if algorithm.advantage.use in BUILT_IN["advantages"]:
            options = {"normalise_std": algorithm.normalise_std} | options
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
    from fiberpo_megatron.telemetry.sinks import check_sinks
    from fiberpo_megatron.weight_sync.choose import check_publisher

    make_objective(config)
    make_advantage(config)
    if not config.environments:
        raise ConfigError("there are no environments; add [[environments]] with `name` and `use` to the config")
    try:
        check_optimizer(config)
        check_publisher(config)
        check_sinks(config)
        found = {setting: find(kind, plugin.use, setting) for setting, kind, plugin in _imported(config)}
        recorded = _recorded_versions(config.run.folder) if resume else {}
        for setting, _, plugin in _imported(config):
            check_version(found[setting], recorded.get(setting) or plugin.version, setting)
        for environment in config.environments if environments else ():
            setting = f"environments.{environment.name}"
            version = environment.version or recorded.get(setting)
            described = describe(environment.model_copy(update={"version": None}))
            check_version(Plugin(described.path, None, described.version), version, setting)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def recorded(config: Config, environments: Sequence[tuple[str, str | None]]) -> Config:
    """Return the config with the import path and version of every plug-in that is not this package's own.

    The token weights that the objective chooses, and the options that its preset gives, are written out as well.
    `environments`: (import path, version) of each environment, as its worker said them.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    objective, algorithm = make_objective(config), values["algorithm"]
    algorithm.setdefault("weighting", objective.weighting)
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
        section, _, key = setting.partition(".")
        name, _, place = key.partition(".")
        if place:
            values[section][name][int(place)] = table
        else:
            values[section][name] = table
    return Config.model_validate(values)


def _imported(config: Config) -> Iterator[tuple[str, str, PluginConfig]]:
    """(setting, kind, plug-in) of all that are imported into the ranks, the built-in objectives apart."""
    objective = config.algorithm.objective
    if objective.use not in OBJECTIVES:
        yield "algorithm.objective", "objectives", objective
    yield "algorithm.advantage", "advantages", config.algorithm.advantage
    yield "optimizer.kind", "optimizers", config.optimizer.kind
    yield "weight_sync.method", "publishers", config.weight_sync.method
    for number, sink in enumerate(config.telemetry.sinks):
        yield f"telemetry.sinks.{number}", "sinks", sink


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
        for number, sink in enumerate(values.get("telemetry", {}).get("sinks", [])):
            if isinstance(sink, dict) and "version" in sink:
                found[f"telemetry.sinks.{number}"] = sink["version"]
    return found
