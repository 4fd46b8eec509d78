"""This module times matrix products and copies on the device of one rank, while the other ranks do the same."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fiberpo_megatron.calibration.timing import timed

PRODUCTS: dict[str, dict[torch.dtype, tuple[tuple[int, int, int], ...]]] = {
    "cpu": {torch.float32: ((512, 128, 128), (512, 512, 512), (1024, 1024, 1024)), torch.bfloat16: ((256, 256, 256),)},
    "cuda": dict.fromkeys(
        (torch.float32, torch.bfloat16), ((2048, 2048, 2048), (8192, 4096, 4096), (16384, 8192, 8192))
    ),
}
"""(rows, inputs, outputs) by device and type. Many CPUs have no bfloat16 units, so that one small product has to do."""
COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
REPEATED = 1e10
"""Operations of a round at least: small products are repeated, so that the clock's resolution does not matter."""


def time_products(device: torch.device, together: Callable[[], object]) -> dict[str, list[float]]:
    """Return the 10^12 operations a second of each round by `TYPE/ROWSxINPUTSxOUTPUTS`."""
    works, operations = {}, {}
    for dtype, shapes in PRODUCTS[device.type].items():
        for rows, inputs, outputs in shapes:
            left = torch.randn(rows, inputs, device=device).to(dtype)
            right = torch.randn(inputs, outputs, device=device).to(dtype)
            name = f"{str(dtype).removeprefix('torch.')}/{rows}x{inputs}x{outputs}"
            once = 2.0 * rows * inputs * outputs
            times = max(1, round(REPEATED / once)) if dtype == torch.float32 or device.type == "cuda" else 1
            works[name] = partial(_repeat, left, right, times)
            operations[name] = once * times
    return {
        name: [operations[name] / 1e12 / seconds for seconds in found]
        for name, found in timed(works, device, together).items()
    }


def _repeat(left: Tensor, right: Tensor, times: int) -> None:
    for _ in range(times):
        left @ right


def time_copies(device: torch.device, together: Callable[[], object]) -> list[float]:
    """Return the 10^9 bytes a second that a copy reads and writes, in each round."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    found = timed({"copy": lambda: target.copy_(source)}, device, together)["copy"]
    return [2e-9 * source.nbytes / seconds for seconds in found]


def best(rates: Mapping[str, list[float]], dtype: str) -> list[float]:
    """Return the rounds of the fastest product of a type."""
    return max((found for name, found in rates.items() if name.startswith(f"{dtype}/")), key=sum)
