"""This module turns parts that were given from Python into settings, so that config.toml names all of a run.

A part is a class, or an object that its class can make again: from the arguments of its constructor, which must be JSON
values. A run then builds every part from its config, whoever gave it, and `fiberpo train config.toml` repeats it.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.environments import Environment
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.fibration import Objective
from fiberpo_megatron.fibration.options import NOT_OPTIONS
from fiberpo_megatron.interfaces import AdvantageEstimator
from fiberpo_megatron.mcore.optimizers import Optimizer
from fiberpo_megatron.settings import PluginConfig
from fiberpo_megatron.trainer.settings import FLAT

EnvironmentsGiven = Mapping[str, type[Environment] | Environment] | Sequence[type[Environment] | Environment]
"""Environments by name, or in order; the names are then those of the classes."""


def with_given(
    config: Config,
    environments: EnvironmentsGiven | None = None,
    objective: Objective | type[Objective] | None = None,
    optimizer: Optimizer | type[Optimizer] | None = None,
    advantage: AdvantageEstimator | type[AdvantageEstimator] | None = None,
) -> Config:
    """Return the config with the given parts in the place of its own.

    An objective's class takes the options of [algorithm] that are set, the preset among them; an object has options of
    its own. Raises
    ConfigError for a part that cannot be named, or whose options are no JSON values.
    """
    algorithm: dict[str, Any] = {}
    if environments is not None:
        config = config.model_copy(update={"environments": environment_configs(environments)})
    if objective is not None:
        algorithm["objective"] = _plugin(objective, "objective")
        if isinstance(objective, Objective):
            algorithm |= {
                **dict.fromkeys(FLAT),
                "preset": "paper",
                "preset_options": None,
                "kernels": objective.kernels,
                "exact_sums": objective.exact_sums,
            }
    if advantage is not None:
        algorithm["advantage"] = _plugin(advantage, "advantage")
    if optimizer is not None:
        adam = {"beta1": None, "beta2": None, "eps": None}
        update = {**adam, "kind": _plugin(optimizer, "optimizer")}
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=update)})
    return config.model_copy(update={"algorithm": config.algorithm.model_copy(update=algorithm)})


def environment_configs(given: EnvironmentsGiven) -> list[EnvironmentConfig]:
    """Return the settings of environments that are given as classes or objects. Their workers make their own
    instances."""
    named = given.items() if isinstance(given, Mapping) else [(_class(item).__name__, item) for item in given]
    found = []
    for name, item in named:
        if not issubclass(_class(item), Environment):
            raise ConfigError(f"environments: {item!r} is no Environment; derive its class from it")
        plugin = _plugin(item, f"environments.{name}")
        found.append(EnvironmentConfig(name=name, use=plugin.use, options=plugin.options))
    return found


def _plugin(item: Any, setting: str) -> PluginConfig:
    return PluginConfig(
        use=_path_of(_class(item), setting), options={} if inspect.isclass(item) else _options(item, setting)
    )


def _class(item: Any) -> type:
    return item if inspect.isclass(item) else type(item)


def _path_of(cls: type, setting: str) -> str:
    """An import path that other processes can follow; a class of the running script is found by its file."""
    if "<locals>" in cls.__qualname__:
        raise ConfigError(
            f"{setting}: {cls.__qualname__} is defined inside a function, where no other process can find it; move it "
            "to the top level of a module"
        )
    if cls.__module__ != "__main__":
        return f"{cls.__module__}:{cls.__qualname__}"
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:
        raise ConfigError(
            f"{setting}: {cls.__qualname__} is defined in an interactive session, where no other process can find it; "
            "write it into a file"
        )
    return f"{Path(script).resolve()}:{cls.__qualname__}"


def _options(item: Any, setting: str) -> dict[str, Any]:
    """The arguments with which the object's class can make it again."""
    if isinstance(item, Environment):
        args, named = item.constructor_arguments
        options = dict(inspect.signature(type(item)).bind_partial(*args).arguments) | dict(named)
    elif dataclasses.is_dataclass(item):
        fields = [f for f in dataclasses.fields(item) if f.init and f.name not in NOT_OPTIONS]
        options = {f.name: getattr(item, f.name) for f in fields if getattr(item, f.name) is not None}
    else:
        names = [
            n
            for n, p in inspect.signature(type(item)).parameters.items()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        missing = [name for name in names if not hasattr(item, name)]
        if missing:
            raise ConfigError(
                f"{setting}: {type(item).__qualname__} does not keep its argument {missing[0]!r} as an attribute "
                "of that name; let it do so, or give the class and set the options in the config"
            )
        options = {name: getattr(item, name) for name in names}
    try:
        written: dict[str, Any] = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{setting}: the options {options} are no JSON values ({error}); use numbers and texts"
        ) from None
    return written
