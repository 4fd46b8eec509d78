"""This module starts every kernel, so that tests can count and compile them in one place."""

from __future__ import annotations

from typing import Any

OPTIONS = {"enable_fp_fusion": False}
"""How every kernel is compiled. Products and sums are never fused: which product of a * b + c * d goes into a fused
operation is the compiler's choice, and it differs between the tokens that one thread holds. Bits would depend on where
in a block a token lies."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `kernel` on the current CUDA device; grid sides are at least 1."""
    kernel[grid](*arguments, **constants, **OPTIONS)
