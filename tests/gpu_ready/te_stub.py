"""Transformer Engine's Python without its compiled extension, so that a CPU can build what a GPU would run.

The pure-Python wheel of Transformer Engine holds every module class, the choice of the attention backend, and the
wrappers around its kernels. Only `transformer_engine_torch`, the extension, needs CUDA. `install` puts a stand-in in
its place, in which every enumeration has members and every kernel raises. It must be called before Megatron-Core is
imported, and so in a process of its own: `te_ranks.py` starts those.
"""

import os
import sys
import types
import warnings
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType
from typing import Any

ENVIRONMENT = Path(sys.prefix)
VERSIONS = ("2.20.2", "2.10.0")
"""What the README pins, and the oldest version beside which megatron-core 0.16.1 was read."""
TRITON = ENVIRONMENT / "triton-3.7.1"


def folder_of(version: str) -> Path:
    """Return where `make test` installs a version, whether or not it is there."""
    return ENVIRONMENT / f"transformer-engine-{version}"


class KernelCalled(RuntimeError):
    """A kernel of Transformer Engine was reached, which no CPU has."""


class _Members(type):
    """Gives a class the members of an enumeration as they are asked for, with a number each.

    Transformer Engine compares the names that it asked for with `__members__`, and so always finds them the same.
    """

    @property
    def __members__(cls) -> dict[str, int]:
        return {name: value for name, value in vars(cls).items() if not name.startswith("__")}

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        number = len(cls.__members__)
        setattr(cls, name, number)
        return number


class _Extension(types.ModuleType):
    """The stand-in: a name becomes a class that raises when it is called, and has members like an enumeration."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise KernelCalled(f"transformer_engine_torch.{name} was called, and a CPU has no such kernel")

        made = _Members(name, (), {"__new__": called})
        setattr(self, name, made)
        return made


class _Nothing(types.ModuleType):
    """An optional package that Transformer Engine imports for its ONNX export, which no test uses."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self


def install(version: str, kernels: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Make `import transformer_engine.pytorch` give this version, with a stand-in that has these kernels alone.

    Raises FileNotFoundError when the wheel is not installed, and RuntimeError when Megatron-Core has been imported
    before, because it would already have decided that there is no Transformer Engine.
    """
    folder = folder_of(version)
    if not folder.is_dir():
        raise FileNotFoundError(f"Transformer Engine {version} is not in {folder}; run `make transformer-engine`")
    if "megatron.core" in sys.modules:
        raise RuntimeError("Megatron-Core is imported already; install the stand-in in a new process")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine then loads no shared library of CUDA
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    sys.path[:0] = [str(folder)]
    sys.path.append(str(TRITON))  # its permutation kernels are written in Triton
    extension = _Extension("transformer_engine_torch")
    vars(extension).update(kernels)
    sys.modules[extension.__name__] = extension
    unused = {name: _Nothing(name) for name in ("onnxscript", "onnx")}
    sys.modules.update(unused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.common as common  # its package tries the extension once and goes on without

        common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch  # noqa: F401
    for name in unused:
        del sys.modules[name]
