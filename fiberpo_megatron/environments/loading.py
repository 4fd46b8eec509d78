"""This module makes the instance of a user's class in a worker and describes what it offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fiberpo_megatron import plugins
from fiberpo_megatron.environments import Environment, SingleTurn, wire
from fiberpo_megatron.environments.group_rewards import with_group_reward
from fiberpo_megatron.environments.tracebacks import describe_error, trace_of


def load(settings: Mapping[str, Any]) -> tuple[Environment, dict[str, Any]]:
    """Make the instance that the settings name and describe it. Raises PluginError with the cause and the fix."""
    where = f"environment {settings['name']!r}: use"
    try:
        plugin = plugins.find("environments", settings["use"], where)
        plugins.check_version(plugin, settings["version"], where)
        if isinstance(plugin.target, type) and not issubclass(plugin.target, Environment):
            raise _no_environment(plugin, where)  # before its options, which say less
        plugins.check_options(plugin, settings["options"], where)
        group = settings.get("group_reward")
        compares = None if group is None else _group_reward(group, f"environment {settings['name']!r}: group_reward")
    except SystemExit as error:
        raise plugins.PluginError(f"{where} = {settings['use']!r}: its module called sys.exit({error})") from error
    try:
        environment = plugin.target(**settings["options"])
    except BaseException as error:  # a constructor of somebody else's raises what it likes
        hint = f" (memory_gib = {settings['memory_gib']:g})" if isinstance(error, MemoryError) else ""
        message = (
            f"{where}: {plugin.path} could not be made with options = {settings['options']!r}: {describe_error(error)}"
        )
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):  # the class refuses the options
            raise plugins.PluginError(message) from error
        raise plugins.PluginError(
            f"{message}{hint}; correct the options or the class\n{trace_of(error)[-wire.TRACEBACK_CHARACTERS :]}"
        ) from error
    try:
        if compares is not None and isinstance(environment, Environment):
            with_group_reward(environment, compares)
        return environment, _describe(environment, plugin, where)
    except plugins.PluginError:
        raise
    except BaseException as error:
        raise plugins.PluginError(f"{where}: {plugin.path} cannot be used: {describe_error(error)}") from error


def _group_reward(setting: Mapping[str, Any], where: str) -> Any:
    """Make what compares the samples of a task."""
    plugin = plugins.find("group_rewards", setting["use"], where)
    plugins.check_version(plugin, setting["version"], where)
    plugins.check_options(plugin, setting["options"], where)
    try:
        made = plugin.target(**setting["options"])
    except Exception as error:  # a constructor of somebody else's raises what it likes
        raise plugins.PluginError(
            f"{where}: {plugin.path} could not be made with options = {setting['options']!r}: {describe_error(error)}"
        ) from error
    if not callable(made):
        raise plugins.PluginError(f"{where}: {plugin.path} cannot be called; define __call__(self, task, trajectories)")
    return made


def _no_environment(plugin: plugins.Plugin, where: str) -> plugins.PluginError:
    return plugins.PluginError(
        f"{where}: {plugin.path} is no environment; derive it from Environment or SingleTurn of "
        "fiberpo_megatron.environments"
    )


def _describe(environment: Any, plugin: plugins.Plugin, where: str) -> dict[str, Any]:
    """Return the fields of the host's `Description`."""
    if not isinstance(environment, Environment):
        raise _no_environment(plugin, where)

    def defined(method: str, *bases: type) -> bool:
        """Whether the class or the instance defines a method that `bases` do not."""
        own = getattr(environment, method, None)
        inherited = [getattr(base, method, None) for base in bases]
        return callable(own) and getattr(own, "__func__", own) not in inherited

    single_turn = environment.single_turn
    if single_turn is None:
        single_turn = isinstance(environment, SingleTurn) and not defined("run", SingleTurn)
    sizes = {name: _size(environment, name, plugin, where) for name in ("train_size", "held_out_size")}
    needed = [method for method in ("train", "held_out") if sizes[f"{method}_size"] > 0]
    lacking = [f"{method}(index)" for method in needed if not defined(method, Environment)]
    scores, scores_groups = defined("score", SingleTurn), defined("score_group")
    if single_turn and not scores and not scores_groups:
        lacking.append("score(task, turn), or score_group(task, trajectories)")
    if not single_turn and not defined("run", Environment):
        lacking.append("run(task, policy)")
    if lacking:
        raise plugins.PluginError(f"{where}: {plugin.path} lacks the method {lacking[0]}; define it")
    if not any(sizes.values()):
        raise plugins.PluginError(
            f"{where}: {plugin.path} has no tasks: train_size and held_out_size are 0; give it at least one"
        )
    return {
        "path": plugin.path,
        "version": plugin.version,
        **sizes,
        "single_turn": bool(single_turn),
        "scores": scores,
        "scores_groups": scores_groups,
        "deterministic": bool(environment.deterministic),
        "check_all_tasks": bool(environment.check_all_tasks),
        "chat_template_kwargs": wire.plain(environment.chat_template_kwargs, "chat_template_kwargs"),
        "about": str(environment.about),
    }


def _size(environment: Environment, name: str, plugin: plugins.Plugin, where: str) -> int:
    try:
        value: Any = getattr(environment, name)
    except AttributeError:
        raise plugins.PluginError(f"{where}: {plugin.path} lacks `{name}`; set it to the number of its tasks") from None
    value = wire.scalar(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise plugins.PluginError(
            f"{where}: {name} of {plugin.path} is {value!r}; it must be a whole number of at least 0"
        )
    return value
