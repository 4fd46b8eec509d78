"""This module counts what one objective call asks of a GPU beside bytes: operations started, and waits of the host.

`bench_objective.py --operations` prints them.

On a CPU the kernels run in Triton's interpreter, and CPU tensors represent CUDA tensors. What is made of a tensor that
`.cpu()` returned, or of Python numbers, counts as the host's own, and so does every new tensor from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from strict_devices import FREE, WAITS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fiberpo_megatron.fibration.kernels import device_tree, fused, run_plan


@dataclass
class Counts:
    """Holds the counts of one call."""

    operations: int = 0
    """Kernels and torch operations, copies to the host among them."""
    waits: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.host: list[torch.UntypedStorage] = []
        """Storages on the host; they are kept, so that no other storage gets their addresses."""
        self.read_all = False
        """Whether `.cpu()` was called; new tensors are then the host's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made_on_host = name == "lift_fresh" or (not given and self.read_all)
        if made_on_host or any(self.on_host(tensor) for tensor in given):
            self.host += [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        elif name not in FREE:
            by_mask = name in ("index", "index_put_") and any(tensor.dtype == torch.bool for tensor in given[1:])
            self.counts.operations += 1
            self.counts.waits += name in WAITS or by_mask
        return result

    def on_host(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage()._cdata
        return any(storage._cdata == address for storage in self.host)

    def cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `Tensor.cpu`."""
        with _disable_current_modes():
            out = tensor.detach().to("cpu", copy=True)
        self.read(tensor)
        self.read_all = True
        self.host.append(out.untyped_storage())
        return out

    def tolist(self, tensor: torch.Tensor) -> Any:
        """Replace `Tensor.tolist`."""
        self.read(tensor)
        with _disable_current_modes():
            return _TOLIST(tensor)

    def read(self, tensor: torch.Tensor) -> None:
        if not self.on_host(tensor):
            self.counts.operations += 1
            self.counts.waits += 1


_TOLIST = torch.Tensor.tolist


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what objective calls in this block do."""
    counts = Counts()
    counter = _Counter(counts)

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        counts.operations += 1
        with _disable_current_modes():
            kernel[grid](*arguments, **constants)

    with ExitStack() as stack:
        for module in (fused, run_plan, device_tree):
            stack.enter_context(mock.patch.object(module, "launch", launch))
        stack.enter_context(mock.patch.object(torch.Tensor, "cpu", lambda tensor: counter.cpu(tensor)))
        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", lambda tensor: counter.tolist(tensor)))
        stack.enter_context(counter)
        yield counts


def count(call: Callable[[], Any]) -> Counts:
    with counted() as counts:
        call()
    return counts
