"""This package stands in for torchvision, which SGLang imports for image models; no image model runs on the CPU
platform.

Submodules exist and their attributes are empty classes.
"""

import enum
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

__version__ = "0.28.0"
__path__: list[str] = []


class InterpolationMode(enum.Enum):
    NEAREST, NEAREST_EXACT, BILINEAR = "nearest", "nearest-exact", "bilinear"
    BICUBIC, BOX, HAMMING, LANCZOS = "bicubic", "box", "hamming", "lanczos"


class _EmptyModule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else type(name, (), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every torchvision.x an empty module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith("torchvision."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Finder())
