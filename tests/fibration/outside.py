"""Import the losses of verl and TRL from their packages, without what their trainers need.

`make test` puts the two wheels into a folder of their own, without their dependencies. What their modules import but
the losses do not use (Ray, tensordict, accelerate and others, some hundred megabytes) is stood in for by empty modules
while they are imported. A loss that did use one of them would fail: no name in them can be used afterwards.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import transformers.modeling_utils  # noqa: F401 - before the finder, so that it looks for what is really installed

ABSENT = {
    "accelerate",
    "codetiming",
    "datasets",
    "omegaconf",
    "pandas",
    "pyarrow",
    "ray",
    "tensordict",
    "wandb",
    "weave",
}
"""Top-level packages that are not installed."""


class Name(type):
    """Is the type of everything that is imported from an absent package: annotations and base classes need no more."""

    importing = True

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {})

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if not Name.importing:
            raise RuntimeError(f"{cls.__name__} of a package that is not installed was called")
        decorated = len(args) == 1 and not options and callable(args[0])
        return args[0] if decorated else Name(cls.__name__, (), {})


class AbsentModule(types.ModuleType):
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {})


class AbsentPackages(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def losses() -> tuple[Any, Any, Any]:
    """Return verl's `core_algos`, its `ActorConfig`, and TRL's `GRPOTrainer`."""
    sys.meta_path.append(AbsentPackages())
    folder = next(path for path in map(Path, sys.path) if (path / "verl/trainer/ppo/core_algos.py").is_file())
    package = types.ModuleType("verl")  # its __init__.py starts Ray's and tensordict's machinery
    package.__path__ = [str(folder / "verl")]
    sys.modules["verl"] = package
    import verl.trainer.ppo.core_algos as core_algos
    from trl.trainer.grpo_trainer import GRPOTrainer
    from verl.workers.config import ActorConfig

    Name.importing = False
    return core_algos, ActorConfig, GRPOTrainer
