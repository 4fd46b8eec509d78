"""This package stands in for Triton while SGLang is imported, which defines Triton kernels on every platform.

On a CPU no kernel is launched. Any attribute and any submodule exists; `@triton.jit` returns a launcher that raises
when it is called.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

__version__ = "3.7.1"
__path__: list[str] = []


class _Base:
    """An attribute with a capital letter is this class, which can be subclassed with any keyword."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__()


class _Launcher:
    """Represents a kernel that cannot be launched."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__doc__ = getattr(function, "__doc__", None)

    def __getitem__(self, grid: object) -> Callable[..., NoReturn]:
        return self.__call__

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"Triton kernel {self.__name__} called on the CPU stand-in (see sglang_cpu/README.md)")


def jit(*args: Any, **kwargs: Any) -> Any:
    """Decorate a kernel, with or without arguments."""
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0] if isinstance(args[0], _Launcher) else _Launcher(args[0])
    return jit


class _Anything(types.ModuleType):
    """Is a module, a decorator and an empty container at once; its attributes are made when they are read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if full in sys.modules:
            return sys.modules[full]
        made = type(name, (_Base,), {"__module__": self.__name__}) if name[0].isupper() else _Anything(full)
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return jit(*args, **kwargs)

    def __getitem__(self, key: object) -> "_Anything":
        return self

    def __contains__(self, item: object) -> bool:
        return False

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every triton.x.y a module of the kind above."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        parent, _, leaf = module.__name__.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], leaf, module)


class Config:
    """Stores the parameters of an autotuned kernel, and does nothing else."""

    def __init__(
        self, kwargs: dict[str, object] | None = None, num_warps: int = 4, num_stages: int = 2, **extra: object
    ) -> None:
        self.kwargs, self.num_warps, self.num_stages = kwargs or {}, num_warps, num_stages


class _Constexpr:
    def __init__(self, value: object = None) -> None:
        self.value = value


def autotune(*args: object, **kwargs: object) -> Callable[[Any], Any]:
    return lambda function: function


heuristics = autotune


def cdiv(a: int, b: int) -> int:
    return -(a // -b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 1


def __getattr__(name: str) -> types.ModuleType:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"triton.{name}")


def _prepare() -> None:
    """Make the few attributes whose value or type SGLang and torch read during the import."""
    sys.meta_path.insert(0, _Finder())
    importlib.import_module("triton.language").constexpr = _Constexpr  # type: ignore[attr-defined]
    importlib.import_module("triton.runtime.jit")
    importlib.import_module("triton.compiler.compiler").triton_key = lambda: "cpu"  # type: ignore[attr-defined]
    autotuner = importlib.import_module("triton.runtime.autotuner")
    for name in ("OutOfResources", "PTXASError"):
        setattr(autotuner, name, type(name, (Exception,), {}))


_prepare()
