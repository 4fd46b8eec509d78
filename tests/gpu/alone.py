"""Functions of a module run in a process of their own, which may use the GPU whatever the caller's process has done."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

TIMEOUT_S = 280.0
"""Less than pytest allows a test, so that the error names the function."""


def alone(function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """Return `function(*arguments)`, computed in a fresh process.

    It raises what the function raises, TimeoutError when it takes too long, and BrokenProcessPool when it crashes. A
    forked process could not use a GPU that its parent has asked about.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name may have no address
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        return pool.submit(function, *arguments).result(timeout=timeout_s)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
