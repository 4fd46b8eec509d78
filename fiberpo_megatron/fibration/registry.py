"""Find objectives by short name, import path or class; `build_objective` makes one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fiberpo_megatron.fibration.objective import Objective
from fiberpo_megatron.fibration.options import Option, check_class, given_options, options_of
from fiberpo_megatron.fibration.presets import with_preset
from fiberpo_megatron.plugins import find, short_names
from fiberpo_megatron.user_warnings import nowhere, warn_user, warnings_to

Class = TypeVar("Class", bound=type[Objective])

KIND = "objectives"
_REGISTERED: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[Class], Class]:
    """Give an objective's class a short name; write it above `@dataclass(frozen=True)`.

    Raises ValueError for a name that another class has, or that looks like an import path.
    """

    def add(cls: Class) -> Class:
        known = _REGISTERED.get(name)
        if known is not None and _path(known) != _path(cls):
            raise ValueError(f"the objective name {name!r} belongs to {_path(known)}; register {_path(cls)} as another")
        if not name or ":" in name:
            raise ValueError(f"{name!r} cannot be the short name of {_path(cls)}; leave out the colon")
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return add


def registered_names() -> tuple[str, ...]:
    """Return the short names of all objectives that are registered by now, this package's own first."""
    return tuple(_REGISTERED)


def objective_class(objective: str | type[Objective], setting: str = "algorithm.objective") -> type[Objective]:
    """Return the class behind a short name, an import path "package.module:Class", or the class itself.

    `setting` names the setting in errors. Raises ValueError for an unknown name, for a module that cannot be imported,
    and for a class that is no complete objective; the message names the fix.
    """
    cls: Any = objective
    if isinstance(objective, str):
        if objective in _REGISTERED:
            return _REGISTERED[objective]
        known = (*_REGISTERED, *short_names(KIND))
        if ":" not in objective and objective not in known:
            raise ValueError(
                f"unknown objective {objective!r}; choose one of {', '.join(known)}, or name a class of "
                'your own by its import path, "package.module:Class"'
            )
        cls = find(KIND, objective, setting).target
    if not (inspect.isclass(cls) and issubclass(cls, Objective)):
        raise ValueError(
            f"objective {objective!r} is no subclass of fiberpo_megatron.fibration.Objective; derive it from "
            "TokenObjective or Objective"
        )
    lacking = sorted(getattr(cls, "__abstractmethods__", ()))
    if lacking:
        raise ValueError(f"objective {_path(cls)} lacks the method {lacking[0]}(); define it (docs/fibration.md)")
    check_class(cls)
    return cls


def build_objective(
    objective: str | type[Objective] | Objective,
    *,
    preset: str | Mapping[str, Any] | None = None,
    kernels: bool | None = None,
    exact_sums: bool | None = None,
    **options: Any,
) -> Objective:
    """Return an objective by name, import path or class, with its options checked.

    Args:
        objective: a short name such as "grpo", an import path "package.module:Class", a subclass of `Objective`, or an
            objective that is already built, which takes no options.
        preset: what gives the options that are not passed: "paper" (or None) for the bare form, each option's default;
            "recommended" for the numbers of `presets.RECOMMENDED`; or a table of options, such as a run recorded of
            what was recommended then. Objectives that are not listed there have no preset and take their defaults.
        kernels: True insists on the fused Triton kernels, False on torch; None takes the kernels where they can run.
        exact_sums: False adds up node sums in float64 on the torch path; None is True (`Objective.exact_sums`).
        options: fields of the class (`objective_options` lists them). An option that is None counts as not given.

    Raises:
        ValueError: an unknown name, an option that this objective does not read, or a bad value; names the fix.
    """
    how = {name: value for name, value in {"kernels": kernels, "exact_sums": exact_sums}.items() if value is not None}
    if isinstance(objective, Objective):
        named = sorted(name for name, value in {"preset": preset, **options}.items() if value is not None)
        if named:
            raise ValueError(
                f"objective {objective.name!r} is already built and takes no options; give {', '.join(named)} to its "
                "constructor"
            )
        with warnings_to(nowhere):  # its constructor has given them
            return dataclasses.replace(objective, **how) if how else objective
    cls = objective_class(objective)
    given = chosen = given_options(cls, cls.name, options)
    if preset is not None:
        chosen = given_options(cls, cls.name, with_preset(cls, given, preset))
    with warnings_to(nowhere):  # the options of a preset are not the user's
        built = cls(**chosen, **how)
    for advice in built.advice(given):
        warn_user(str(advice))
    return built


def objective_options(objective: str | type[Objective]) -> list[Option]:
    """Return the options of an objective in the order of its fields: name, type, default and description."""
    return options_of(objective_class(objective))


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
