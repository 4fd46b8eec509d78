"""This module finds what a config names: a class by its import path, or by a short name.

A name is looked up in this order: `package.module:Class` is imported (the current folder is importable), and so is
`folder/file.py:Class`; a short name
is one of this package's own, or one that an installed package declares as an entry point of the group
`fiberpo.<kind>`, for example `fiberpo.environments`. This module imports the standard library alone, so that the
worker of an environment can use it in an interpreter of its own.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "environments": {
        "chat": "fiberpo_megatron.environments.builtin.chat:Chat",
        "code": "fiberpo_megatron.environments.builtin.code:Code",
        "judge": "fiberpo_megatron.environments.builtin.judge:Judge",
        "gateway": "fiberpo_megatron.environments.builtin.gateway:Gateway",
        "math": "fiberpo_megatron.environments.builtin.math:Math",
        "reasoning_gym": "fiberpo_megatron.environments.builtin.reasoning_gym:ReasoningGym",
        "tools": "fiberpo_megatron.environments.builtin.tools:Tools",
        "verifiers": "fiberpo_megatron.environments.builtin.verifiers:Verifiers",
    },
    "group_rewards": {"shorter": "fiberpo_megatron.environments.group_rewards:Shorter"},
    "families": {
        "llama": "fiberpo_megatron.mcore.families.llama:FAMILY",
        "qwen2": "fiberpo_megatron.mcore.families.qwen2:FAMILY",
        "qwen3": "fiberpo_megatron.mcore.families.qwen3:FAMILY",
        "qwen3_moe": "fiberpo_megatron.mcore.families.qwen3_moe:FAMILY",
        "mixtral": "fiberpo_megatron.mcore.families.mixtral:FAMILY",
        "deepseek_v3": "fiberpo_megatron.mcore.families.deepseek_v3:FAMILY",
    },
    "objectives": {},
    "advantages": {
        "group-mean": "fiberpo_megatron.trainer.advantages:GroupMean",
        "leave-one-out": "fiberpo_megatron.trainer.advantages:LeaveOneOut",
        "rloo": "fiberpo_megatron.trainer.advantages:RLOO",
        "reinforce++": "fiberpo_megatron.trainer.advantages:BatchStandardised",
        "none": "fiberpo_megatron.trainer.advantages:NoBaseline",
    },
    "optimizers": {"adam": "fiberpo_megatron.mcore.optimizers.adam:Adam"},
    "publishers": {
        "disk": "fiberpo_megatron.weight_sync.disk:DiskPublisher",
        "distributed": "fiberpo_megatron.weight_sync.distributed:DistributedPublisher",
        "ipc": "fiberpo_megatron.weight_sync.ipc:IpcPublisher",
    },
    "alarms": {},
    "sinks": {
        "tensorboard": "fiberpo_megatron.telemetry.sinks:TensorBoardSink",
        "wandb": "fiberpo_megatron.telemetry.sinks:WandbSink",
    },
}
"""Import paths of this package's own plug-ins by kind and short name."""


class PluginError(ValueError):
    """A plug-in cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Plugin:
    """Holds a plug-in that was found."""

    path: str
    """Import path, `package.module:Class`."""
    target: Any
    """The class (or function) itself."""
    version: str | None
    """Distribution and version that it came from, such as `my-package 1.2.0`; None for a file of no package."""


def short_names(kind: str) -> list[str]:
    """Return all short names of a kind: this package's own and those of installed packages."""
    return sorted({*BUILT_IN.get(kind, {}), *(point.name for point in metadata.entry_points(group=f"fiberpo.{kind}"))})


def import_path(kind: str, name: str, setting: str) -> str:
    """Return the import path behind a short name; an import path is returned as it is.

    `setting` names the setting in errors. Raises PluginError for an unknown short name.
    """
    if ":" in name:
        return name
    if name in BUILT_IN.get(kind, {}):
        return BUILT_IN[kind][name]
    for point in metadata.entry_points(group=f"fiberpo.{kind}", name=name):
        return point.value
    known = short_names(kind)
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known short names: {', '.join(known) or 'none'}"
    raise PluginError(
        f'{setting} = "{name}" is neither a short name nor an import path; {hint} A class of your own is written as '
        '"package.module:Class"'
    )


def find(kind: str, name: str, setting: str) -> Plugin:
    """Import the plug-in that a setting names. Raises PluginError with the cause and the fix."""
    path = import_path(kind, name, setting)
    module_name, _, attribute = path.rpartition(":")
    where = f'{setting} = "{name}"'
    make_current_folder_importable()
    try:
        module = _from_file(module_name) if module_name.endswith(".py") else import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise PluginError(
                f"{where}: there is no module {missing!r}, neither in the current folder ({os.getcwd()}) nor installed "
                f"for {sys.executable}; correct the name, or run from the folder that holds it"
            ) from error
        raise PluginError(
            f"{where}: {module_name} needs the module {missing!r}, which {sys.executable} does not have; install it"
        ) from error
    except Exception as error:  # a module of somebody else's raises what it likes
        raise PluginError(
            f"{where}: importing {module_name} failed with {type(error).__name__}: {error}; correct that module"
        ) from error
    target: Any = module
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if not attribute or target is None:
        names = [n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name]
        raise PluginError(
            f"{where}: {module_name} has no {attribute or 'class in the name'}; it defines "
            f"{', '.join(names) or 'no class'}"
        )
    return Plugin(path, target, None if module_name.endswith(".py") else package_version(module_name))


def _from_file(path: str) -> Any:
    """The module of a file, which keeps one name however often it is asked for."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and os.path.abspath(script) == os.path.abspath(path):
        return sys.modules["__main__"]  # the running script: it need not run a second time
    name = f"fiberpo_file_{os.path.abspath(path)}".replace(".", "_").replace(os.sep, "_")
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def require(plugin: Plugin, methods: Sequence[str], setting: str) -> None:
    """Raise PluginError when the class lacks one of `methods`."""
    lacking = [name for name in methods if not callable(getattr(plugin.target, name, None))]
    if lacking:
        raise PluginError(f"{setting}: {plugin.path} lacks the method {lacking[0]}(); define it (docs/extending.md)")


def parameters(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the named parameters of a plug-in, and whether it takes any other name as well.

    A constructor that ends in `**options` hands them to its base class: it takes the parameters of that class too,
    without those that the attribute `not_options` of the plug-in names because it sets them itself.

    Raises TypeError or ValueError for a class of C code, which has no signature.
    """
    signatures = [inspect.signature(target)]
    if inspect.isclass(target) and "__init__" in vars(target):
        bases = [vars(base)["__init__"] for base in target.__mro__[1:-1] if "__init__" in vars(base)]
        signatures += [inspect.signature(constructor) for constructor in bases]
    named: dict[str, inspect.Parameter] = {}
    for signature in signatures:
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self":
                named.setdefault(name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            break
    else:
        return named, True
    return {name: named[name] for name in named if name not in getattr(target, "not_options", ())}, False


def check_options(plugin: Plugin, options: Mapping[str, Any], setting: str, given: Sequence[str] = ()) -> None:
    """Raise PluginError when the class does not take these options, or needs one that is missing.

    `given`: arguments that the caller passes besides the options; they cannot be options.
    """
    try:
        named, anything = parameters(plugin.target)
    except (TypeError, ValueError):  # a class of C code has no signature to compare with
        return
    own = [name for name in named if name not in given]
    for name in options:
        if name not in own and not anything:
            close = get_close_matches(name, own, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(own) or 'no option'}"
            raise PluginError(f"{setting}: {plugin.path} does not take the option {name!r}; {hint}")
    for name in own:
        if named[name].default is inspect.Parameter.empty and name not in options:
            raise PluginError(f"{setting}: {plugin.path} needs the option {name!r}; add it to `options`")


def check_version(plugin: Plugin, recorded: str | None, setting: str) -> None:
    """Raise PluginError when the run was started with another version than the one that is installed."""
    if recorded is not None and plugin.version is not None and recorded != plugin.version:
        raise PluginError(
            f"{setting}: the run was started with {plugin.path} of {recorded}, this interpreter has {plugin.version}; "
            f"install {recorded}, or accept the other version by setting `version` to {plugin.version!r}"
        )


def package_version(module_name: str) -> str | None:
    """Return the distribution and version of a module, such as `my-package 1.2.0`; None for a file of no package."""
    top = module_name.split(".")[0]
    for distribution in metadata.distributions():
        if _provides(distribution, top):
            return f"{distribution.metadata['Name']} {distribution.version}"
    version = getattr(sys.modules.get(top), "__version__", None)
    return f"{top} {version}" if isinstance(version, str) else None


def _provides(distribution: metadata.Distribution, top: str) -> bool:
    """Return whether a distribution has a module of this name. `packages_distributions` of the standard library says
    the same, but it parses every file list, which takes most of the time in which a worker starts."""
    listed = distribution.read_text("top_level.txt")
    if listed is not None:
        return top in listed.split()
    files = "\n" + (distribution.read_text("RECORD") or "")
    return f"\n{top}/" in files or f"\n{top}.py," in files


def make_current_folder_importable() -> None:
    """Put the current folder behind everything else on the import path."""
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
