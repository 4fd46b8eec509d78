"""Ranks that run the GPU platform and Transformer Engine's Python on a CPU, over gloo.

A `Driver` is one process in which the stand-in of `te_stub.py` was installed before Megatron-Core was imported. It
forks the ranks of a layout from itself, so that the imports are paid for once. Transformer Engine's classes are its
own, and compute by `te_emulation`; whatever else would start a kernel raises.
"""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.context import ForkContext
from types import SimpleNamespace
from typing import Any

PATCHES = (
    "current_device",
    "cuda_literals",
    "cuda_type_names",
    "random_state",
    "streams",
    "synchronize",
    "dispatcher_splits",
    "uneven_gloo",
)
"""Those of the CPU platform's patches that stand for a GPU or for NCCL. The others stand for Transformer Engine."""


class Driver:
    """Runs functions of modules on the ranks of a layout. Its process ends with the interpreter that made it."""

    def __init__(self, version: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=prepare, initargs=(version,))

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0) -> Any:
        """Return what the function returns in the process that was prepared, without process groups."""
        return self._pool.submit(function, *arguments).result(timeout_s)

    def run_ranks(
        self, size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 240.0
    ) -> list[Any]:
        """Return what the function returned on each of `size` ranks, in rank order. Raises RanksFailed."""
        return self._pool.submit(_fork, size, function, arguments, timeout_s).result(timeout_s + 60)


@cache
def driver_of(version: str) -> Driver:
    """Return the driver of a version of Transformer Engine; the test files of this process share it."""
    return Driver(version)


def _fork(size: int, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> list[Any]:
    from fiberpo_megatron.certify import processes

    processes.multiprocessing.get_context = lambda method=None: ForkContext()  # type: ignore[attr-defined]
    return processes.run_ranks(size, function, *arguments, timeout_s=timeout_s)


def _for_transformer_engine() -> bool:
    """Answer `torch.cuda.is_available()`: a module of Transformer Engine refuses to be built without a GPU."""
    return str(sys._getframe(1).f_globals["__name__"]).startswith("transformer_engine")


def prepare(version: str) -> None:
    """Make this process one with a GPU platform: the stand-in, the patches of a machine without CUDA, Megatron-Core."""
    import torch

    from tests.gpu_ready.te_emulation import emulate, emulate_megatron, kernels
    from tests.gpu_ready.te_stub import install

    torch.set_num_threads(1)  # a forked process must not inherit a thread pool
    install(version, kernels())
    emulate()
    from fiberpo_megatron.mcore import platform
    from fiberpo_megatron.mcore.cpu import patches

    with patches.without_compiler():
        for patch in patches.PATCHES:
            if patch.name in PATCHES:
                patch.apply()
    unknown = set(PATCHES) - {patch.name for patch in patches.PATCHES}
    assert not unknown, f"the CPU platform has no patches {unknown}"
    import fiberpo_megatron.mcore.policy  # noqa: F401

    emulate_megatron()
    card = SimpleNamespace(major=9, minor=0, name="an H100 that is made up")
    torch.cuda.get_device_properties = lambda device=None: card
    fakes = {"is_available": lambda: True, "device_count": lambda: 8, "set_device": lambda device: None}
    stock = {name: getattr(torch.cuda, name) for name in fakes}
    vars(torch.cuda).update(fakes)
    found = platform.activate()
    vars(torch.cuda).update(stock, is_available=_for_transformer_engine)
    assert found.name == "gpu"
    found.backend, found.device = "gloo", torch.device("cpu")
