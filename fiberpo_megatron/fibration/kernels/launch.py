"""This module starts every kernel, so that tests can count and compile them in one place."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `kernel` on the current CUDA device; grid sides are at least 1."""
    kernel[grid](*arguments, **constants)
